"""Layers that are split over ranks compile whole, and talk to the other ranks no more often than they must."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoint_files import llama
from counted_operations import Operations

from panda.engine.processes import Processes
from panda.engine.tensor_parallel import make_groups
from panda.engine.tensor_parallel import split
from panda.registry.contexts import TensorParallelPlan

PLAN = TensorParallelPlan(
    column=("*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj", "*.up_proj"),
    row=("*.o_proj", "*.down_proj"),
    vocabulary=(),
    sizes={},
    blocks=("*.self_attn", "*.mlp"),
)


@pytest.fixture
def alone(processes: Processes) -> Processes:
    """One rank, in groups of one."""
    return replace(processes, mpu=make_groups(1))


def outputs(layer: Any, model: Any) -> list[torch.Tensor]:
    """Of a layer, its output and the gradients of its input and weights."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, model.config.hidden_size, generator=generator).requires_grad_()
    rope = model.model.rotary_emb(hidden, torch.arange(5)[None])
    output = layer(hidden, position_embeddings=rope)
    output.square().sum().backward()
    return [output.detach(), hidden.grad, *(weight.grad.clone() for weight in layer.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("blocks", [True, False])
def test_a_layer_sums_twice_in_each_direction(alone: Processes, blocks: bool) -> None:
    """Without blocks each of the five layers that share two inputs sums the gradient of its own."""
    model = llama(0)
    plain = outputs(copy.deepcopy(model.model.layers[0]), model)
    split(model, PLAN if blocks else replace(PLAN, blocks=()), alone)
    with Operations() as operations:
        found = outputs(model.model.layers[0], model)
    assert operations.counts["_c10d_functional::all_reduce"] == (4 if blocks else 7)
    assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True))


def test_a_split_layer_compiles_into_one_graph(alone: Processes) -> None:
    model = llama(0)
    split(model, PLAN, alone)
    layer = model.model.layers[0]
    plain = outputs(layer, model)
    layer.zero_grad()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(outputs(compiled, model), plain, strict=True))
