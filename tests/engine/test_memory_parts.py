"""What DeepSpeed keeps of a model, by formulas: against arithmetic by hand, and against the tensors of real engines."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_engine import WAYS

from panda.configuration.options import RunOptions
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.memory_parts import MemoryParts
from panda.engine.memory_parts import Sizes
from panda.engine.memory_parts import held
from panda.engine.processes import Processes

BILLION = 1_000_000_000
SIZES = Sizes(trained=7 * BILLION, frozen=0, elements=7 * BILLION, largest=131_072_000, largest_group=202_000_000)
LARGEST, BUCKET = 131_072_000, 500_000_000


def parts_of(sizes: Sizes, world_size: int, state_bytes: float = 8, **options: Any) -> tuple[MemoryParts, int]:
    chosen = RunOptions(**options)
    config = deepspeed_config(chosen, world_size=world_size, on_gpu=True)
    found = held(sizes, chosen, config, world_size=world_size, state_bytes=state_bytes)
    return found.parts, found.step


ONE = {"gradient_accumulation_steps": 1}
"""One micro batch, which is no sum."""


@pytest.mark.parametrize(
    ("options", "ranks", "weights", "masters", "states", "sums", "gradients", "buffers", "step"),
    [
        # GB for 7 billion weights, AdamW with 8 bytes a weight.
        ({"precision": "fp32"}, 1, 28, 0, 56, 0, 28, 0, 0),
        ({"precision": "fp32"}, 4, 28, 0, 56, 0, 28, 2, 0),
        ({"precision": "fp32", "zero_stage": 1}, 4, 28, 7, 14, 0, 28, 2, 0.202),
        ({"precision": "fp32", "zero_stage": 2}, 4, 28, 7, 14, 7, 4 * 0.131072, 2, 0.202),
        ({"precision": "fp32", "zero_stage": 3}, 4, 7, 7, 14, 7, 4 * 0.131072, 4 + 2, 4),
        ({"precision": "bf16", "zero_stage": 0}, 1, 14, 28, 56, 0, 14, 0, 28),
        ({"precision": "bf16"}, 1, 14, 28, 56, 28, 2 * 0.131072, 0, 0),
        ({"precision": "bf16"}, 4, 14, 7, 14, 28, 2 * 0.131072, 0, 1.073741824),
        ({"precision": "fp16"}, 4, 14, 7, 14, 28, 2 * 0.131072, 1, 0.202 + 7),
        ({"precision": "bf16", "zero_stage": 2}, 4, 14, 7, 14, 7, 2 * 0.131072, 1, 0.202),
        ({"precision": "bf16", "zero_stage": 3}, 4, 3.5, 7, 14, 7, 2 * 0.131072, 2 + 1, 4),
        ({"precision": "bf16", "zero_stage": 2, **ONE}, 4, 14, 7, 14, 3.5, 2 * 0.131072, 1, 0.202),
        ({"precision": "bf16", "zero_stage": 3, **ONE}, 4, 3.5, 7, 14, 3.5, 2 * 0.131072, 2 + 1, 4),
        ({"precision": "bf16", "zero_stage": 3}, 1, 14, 28, 56, 28, 2 * 0.131072, 1, 4),
    ],
)
def test_each_stage_holds_what_arithmetic_says(
    options: dict[str, Any],
    ranks: int,
    weights: float,
    masters: float,
    states: float,
    sums: float,
    gradients: float,
    buffers: float,
    step: float,
) -> None:
    parts, in_step = parts_of(SIZES, ranks, **options)
    expected = (weights, masters, states, sums, gradients, buffers)
    found = (parts.weights, parts.masters, parts.optimizer, parts.accumulators, parts.gradients, parts.buffers)
    assert found == tuple(round(each * BILLION) for each in expected)
    assert in_step == round(step * BILLION)
    assert parts.standing == round((weights + masters + states + sums) * BILLION)
    assert parts.total == sum(found)


def test_frozen_weights_have_nothing_but_themselves() -> None:
    sizes = Sizes(10_000_000, 4 * BILLION, 7 * BILLION // 4, 1_000_000, 1_000_000, 90_000_000, 400_000_000)
    parts, _ = parts_of(sizes, 1, precision="bf16", use_lora=True, use_quant=True)
    assert parts.by_kind() == {
        "weights": 4 * BILLION + 20_000_000,
        "masters": 40_000_000,
        "optimizer": 80_000_000,
        "accumulators": 40_000_000,
        "gradients": 2_000_000,
        "buffers": 90_000_000,
    }
    whole, _ = parts_of(sizes, 1, precision="bf16", use_lora=True, use_quant=True, activation_checkpointing="full")
    assert whole.buffers == 400_000_000  # a layer that is recomputed keeps its dequantised weights for its backward


def test_sizes_in_deepspeeds_file_and_offloading_count(tmp_path: Any) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"reduce_bucket_size": 1e6, "offload_optimizer": {"device": "cpu"}}}')
    parts, _ = parts_of(SIZES, 4, precision="bf16", zero_stage=2, deepspeed_config=str(file))
    assert (parts.masters, parts.optimizer, parts.accumulators, parts.buffers) == (0, 0, 0, 2_000_000)
    assert parts.weights == 14 * BILLION


def test_layers_decide_what_zero_3_gathers_and_reduces_at_once(tmp_path: Any) -> None:
    sizes = replace(SIZES, layer=200_000_000, outside=600_000_000)
    parts, _ = parts_of(sizes, 4, precision="bf16", zero_stage=3)
    assert parts.buffers == 2 * (600_000_000 + 3 * 200_000_000 + 200_000_000 // 4 + (1 << 24))
    assert parts.gradients == 2 * 2 * 200_000_000
    adapters, _ = parts_of(replace(sizes, trained=70_000_000), 4, precision="bf16", zero_stage=3)
    assert adapters.buffers == 2 * (600_000_000 + 3 * 200_000_000 + 2_000_000 // 4 + (1 << 24)), "2 million trained"
    assert adapters.gradients == SIZES.largest * 2
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage3_max_live_parameters": 0, "reduce_bucket_size": 1e6}}')
    parts, _ = parts_of(sizes, 4, precision="bf16", zero_stage=3, deepspeed_config=str(file))
    least = 600_000_000 + 3 * 200_000_000
    assert parts.buffers == 2_000_000 + 2 * (least + 200_000_000 // 4), "and what arrives of a layer's gradients"
    alone, _ = parts_of(sizes, 1, precision="bf16", zero_stage=3, deepspeed_config=str(file))
    assert alone.buffers == 2_000_000 + 2 * 200_000_000
    file.write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1e6}}')
    parts, _ = parts_of(sizes, 1, precision="bf16", zero_stage=3, deepspeed_config=str(file))
    assert (parts.buffers, parts.gradients) == (2_000_000, 2 * SIZES.largest)


def test_parts_are_named_by_size() -> None:
    parts = MemoryParts(weights=3 * 2**30, optimizer=12 * 2**30, gradients=2**20)
    assert parts.describe() == "optimizer states 12.0, weights 3.0"


# -- real engines


class Batch:
    tokens = units = 1
    idle = False
    real = torch.ones(1, 1)

    def to(self, device: torch.device) -> Batch:
        return self


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    result: torch.Tensor = model(torch.ones(1, 512, dtype=next(model.parameters()).dtype)).float().sum()
    return result


def storages() -> dict[int, int]:
    gc.collect()
    plain = (torch.Tensor, torch.nn.Parameter)  # not a FakeTensor that another test's compiler has left: it has no data
    tensors = [one for one in gc.get_objects() if type(one) in plain and one.device.type == "cpu"]
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}


@pytest.mark.parametrize(("precision", "zero_stage"), WAYS)
def test_an_engine_holds_that_between_steps(processes: Processes, precision: Any, zero_stage: int) -> None:
    gc.unfreeze()
    before = storages()
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(4)))
    optimizer = torch.optim.AdamW([{"params": [layer.weight]} for layer in model], lr=0.1)
    options = RunOptions(precision=precision, zero_stage=zero_stage, gradient_accumulation_steps=2)
    config = deepspeed_config(options, world_size=1, on_gpu=False)
    elements = 4 * 512 * 512
    engine = Engine(model, optimizer, config, processes)
    engine.step([Batch(), Batch()], loss_sum)
    held_now = sum(size for key, size in storages().items() if key not in before)
    sizes = Sizes(elements, 0, elements, 512 * 512, 512 * 512, layer=512 * 512)
    parts = held(sizes, options, config, world_size=1, state_bytes=8).parts
    expected = parts.standing
    if zero_stage == 2:
        expected -= parts.accumulators  # made in a step's first backward pass
    if zero_stage == 3:
        expected += parts.buffers  # through which gradients go
    assert held_now == pytest.approx(expected, rel=1e-4)
    engine.close()
