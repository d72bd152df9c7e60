"""Trains a small model of layers on two ranks with ZeRO-3: gradients, and how many times they were reduced.

``python summed_gradients.py OUTPUT.json``: for each way, of each of three steps, the largest error of the mean
gradients relative to those that one process computes in float64, whether they are to the bit those of DeepSpeed's own
reduction, and whether the step was taken. Of all steps, the number of reductions, of layers that had gradients at the
same time at most, and of layers whose sums are several tensors.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from panda.configuration.options import RunOptions
from panda.engine import layer_gradients
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.layer_gradients import LayerGradients
from panda.engine.processes import Processes
from panda.engine.processes import join_processes
from panda.engine.processes import leave_processes

LAYERS, STEPS, MICRO_BATCHES = 4, 3, 3
RATE = 0.1

WAYS: dict[str, dict[str, Any]] = {
    "all layers": {},
    "one micro batch": {"micro_batches": 1},
    "bf16": {"precision": "bf16"},
    "bf16, one micro batch": {"precision": "bf16", "micro_batches": 1},
    "fp16, a step that is skipped": {"precision": "fp16", "bad_step": 1},
    "fp16, gradients that are views of others": {"precision": "fp16", "kind": "views"},
    "fp16, gradients whose sum is too large": {
        **{"precision": "fp16", "scale_power": 14, "factor": 1.4, "micro_batches": 1, "frozen": ("first", "last")}
    },
    "with padding": {"width": 7},
    "small weights kept by all ranks": {"kept": 10},
    "all weights kept by all ranks": {"kept": 1000},
    "recomputed": {"kind": "each recomputed"},
    "recomputed together": {"kind": "all recomputed"},
    "one layer frozen, one in part": {"frozen": ("layers.1", "layers.2.b")},
    "two passes before backward": {"kind": "twice"},
    "a layer used twice": {"kind": "again"},
    "layers that share a weight": {"kind": "shared"},
    "a weight that is first used before its layer": {"kind": "early", "kept": 1000},
    "gradients on the host": {"offload": True},
}
"""Right, and the same to the bit as DeepSpeed's."""
UNUSED: dict[str, dict[str, Any]] = {
    "a layer that some micro batches use": {"kind": "skipped"},
    "a shared weight of a layer that is not used": {"kind": "shared, skipped"},
    "a weight that one rank uses": {"kind": "expert"},
    "the only one of a layer": {"kind": "expert", "frozen": ("layers.0.w", "layers.0.b", "layers.0.v")},
}
"""Right, where DeepSpeed keeps the gradients of the step before, or waits for a gradient that does not come."""


@dataclass
class Batch:
    """Rows of rank ``rank``, of micro batch ``number`` in step ``step``."""

    step: int
    number: int
    rank: int
    factor: float = 1.0
    tokens: int = 3
    units: int = 3
    idle: bool = False
    real: None = None

    def to(self, device: torch.device) -> Batch:
        return self

    def rows(self, width: int, like: torch.Tensor) -> torch.Tensor:
        seed = 100 * self.step + 10 * self.number + self.rank
        return torch.randn(3, width, generator=torch.Generator().manual_seed(seed)).to(like.dtype)


class Layer(torch.nn.Module):
    def __init__(self, width: int, views: bool = False) -> None:
        super().__init__()
        self.added = torch.nn.Parameter(torch.randn(3, width) / 3) if views else None
        self.w = torch.nn.Parameter(torch.randn(width, width) / 3)
        self.b = torch.nn.Parameter(torch.randn(width) / 3)
        self.v = torch.nn.Parameter(torch.randn(width, width) / 3)
        self.expert = torch.nn.Parameter(torch.randn(width) / 3)

    def forward(self, x: torch.Tensor, use_expert: bool, early: torch.Tensor | None = None) -> torch.Tensor:
        if self.added is not None:  # its gradient is a view of that of x
            x = (x.unsqueeze(0) + self.added.unsqueeze(0)).squeeze(0)
        y = torch.tanh(torch.nn.functional.linear(x, self.w, self.b))
        x = x + torch.nn.functional.linear(y, self.v)
        expert = self.expert if early is None else early
        return x + y * expert if use_expert else x


class Model(torch.nn.Module):
    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind, self.width = kind, width
        self.first = torch.nn.Linear(width, width)
        self.layers = torch.nn.ModuleList([Layer(width, kind == "views") for _ in range(LAYERS)])
        self.last = torch.nn.Linear(width, 1)
        if "shared" in kind:
            self.layers[2].v = self.layers[1].v

    def several(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        early = [layer.expert * 1 for layer in self.layers] if self.kind == "early" else [None] * LAYERS
        use_expert = self.kind != "expert" or batch.rank == 1
        for number, layer in enumerate(self.layers):
            skips = batch.step == 1 or batch.number != 1
            if skips and (self.kind, number) in (("skipped", 2), ("shared, skipped", 1)):
                continue
            if self.kind == "each recomputed":
                x = checkpoint(layer, x, use_expert, use_reentrant=False)
            else:
                x = layer(x, use_expert, early[number])
        return self.layers[1](x, use_expert) if self.kind == "again" else x

    def forward(self, batch: Batch) -> torch.Tensor:
        x = self.first(batch.rows(self.width, self.first.bias))
        if self.kind == "all recomputed":
            x = checkpoint(self.several, x, batch, use_reentrant=False)
        else:
            x = self.several(x, batch)
        result: torch.Tensor = self.last(x)
        return result


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    found = model(batch)
    if getattr(model, "module", model).kind == "twice":
        found = found + model(Batch(batch.step + 50, batch.number, batch.rank))
    result: torch.Tensor = found.double().square().sum() * batch.factor
    return result


def batches_of(step: int, way: dict[str, Any], rank: int) -> list[Batch]:
    factor = math.inf if way.get("bad_step") == step and rank == 1 else way.get("factor", 1.0)
    return [Batch(step, number, rank, factor) for number in range(way.get("micro_batches", MICRO_BATCHES))]


def make_model(way: dict[str, Any]) -> Model:
    torch.manual_seed(0)
    model = Model(way.get("kind", ""), way.get("width", 8))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(way.get("frozen", ("nothing",))))
    return model


def train(way: dict[str, Any], processes: Processes) -> tuple[list[dict[str, torch.Tensor]], list[bool]]:
    """Of each step the gradients that the optimizer is given, and whether it was taken."""
    model = make_model(way)
    options = RunOptions(
        precision=way.get("precision", "fp32"),
        zero_stage=3,
        max_grad_norm=0.0,
        gradient_accumulation_steps=way.get("micro_batches", MICRO_BATCHES),
    )
    config = deepspeed_config(options, world_size=processes.world_size, on_gpu=False)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = way.get("kept", 0)
    if way.get("offload"):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if options.precision == "fp16":
        config["fp16"]["initial_scale_power"] = way.get("scale_power", 4)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    engine = Engine(model, torch.optim.SGD(trained.values(), lr=RATE), config, processes)
    gradients: list[dict[str, torch.Tensor]] = []
    step = engine.optimizer.step

    def stepping(*arguments: Any) -> None:
        scale = engine.optimizer.loss_scale
        of_all = {name: engine.optimizer.get_fp32_grad_for_param(each) / scale for name, each in trained.items()}
        gradients.append(of_all)
        step(*arguments)

    engine.optimizer.step = stepping
    taken = [engine.step(batches_of(number, way, processes.rank), loss_sum).applied for number in range(STEPS)]
    engine.close()
    return gradients, taken


def reference(way: dict[str, Any], taken: list[bool], ranks: int) -> list[dict[str, torch.Tensor]]:
    """The gradients of the steps in float64, by one process."""
    model = make_model(way).double()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        batches = [batch for rank in range(ranks) for batch in batches_of(step, way, rank)]
        (sum(loss_sum(model, batch) for batch in batches) / sum(batch.units for batch in batches)).backward()
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        found.append(
            {name: torch.zeros_like(each) if each.grad is None else each.grad.clone() for name, each in trained.items()}
        )
        if taken[step]:
            optimizer.step()
    return found


def error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest over the weights, relative to the largest of the weight's gradients."""
    assert found.keys() == expected.keys()
    largest = [(found[name] - each).abs().max() / (each.abs().max() + 1e-9) for name, each in expected.items()]
    return float(torch.stack(largest).max().nan_to_num(math.inf))


def main() -> None:
    processes = join_processes()
    reductions = waiting = apart = 0
    applies, reduce = layer_gradients._applies, LayerGradients._reduce

    def reducing(gradients: LayerGradients, layer: torch.nn.Module) -> None:
        nonlocal reductions, waiting, apart
        if layer in gradients.messages:
            messages = gradients.messages.values()
            waiting = max(waiting, sum(any(each.grad is not None for each in one.parameters) for one in messages))
            apart = max(apart, sum(len(message.sums) > 1 for message in messages))
            reductions += 1
        reduce(gradients, layer)

    LayerGradients._reduce = reducing  # type: ignore[method-assign]
    results = {}
    for name, way in (WAYS | UNUSED).items():
        reductions = waiting = apart = 0
        ours, taken = train(way, processes)
        found: dict[str, Any] = {"reductions": reductions, "waiting": waiting, "apart": apart, "taken": taken}
        found["errors"] = list(map(error, ours, reference(way, taken, processes.world_size)))
        if name in WAYS:
            layer_gradients._applies = lambda optimizer: False
            theirs, _ = train(way, processes)
            layer_gradients._applies = applies
            bits = [
                all(torch.equal(one[weight], other[weight]) or not step_taken for weight in one)
                for one, other, step_taken in zip(ours, theirs, taken, strict=True)
            ]
            found["same bits"] = bits
        results[name] = found
    if processes.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.barrier()
    leave_processes()


if __name__ == "__main__":
    main()
