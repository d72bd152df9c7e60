"""Runs with a rehearsal, in each of the ways that the argument names; prints what is not as without it.

python rehearsed_steps.py '[["bf16", 2, "offload"], ...]'

What is rehearsed draws random numbers of each kind, moves a running mean, and reaches a layer that steps do not reach,
but for one late micro batch, the second of its step.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ways_on_ranks import try_ways

from panda.configuration.options import RunOptions
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.processes import Processes
from panda.engine.rehearsing import COUNTERS
from panda.engine.rehearsing import HAS_LINKED_STATES
from panda.engine.rehearsing import rehearse
from panda.engine.wrappers import wrapper_of

OFFLOADS = {"": {}, "offload": {"offload_optimizer": {"device": "cpu"}}}
STEPS = 5
FP16_STEPS = 24
"""fp16 skips the first of them, until it has found its loss scale."""


class Batch:
    """Rows, some of which also go through the layer ``rare``."""

    idle = False
    tokens = units = 3
    real = None

    def __init__(self, number: int, rows: int = 3, *, is_rare: bool = False, factor: float = 1.0) -> None:
        self.number, self.rows, self.is_rare, self.factor = number, rows, is_rare, factor

    def to(self, device: torch.device) -> Batch:
        return self


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout = torch.nn.Linear(8, 16), torch.nn.Dropout(0.5)
        self.rare, self.last = torch.nn.Linear(16, 16), torch.nn.Linear(16, 1)
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, rows: torch.Tensor, is_rare: bool) -> torch.Tensor:
        hidden = self.dropout(self.first(rows)) * (1 + 0.1 * random.random() + 0.1 * np.random.rand())
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        if is_rare:
            hidden = hidden + self.rare(hidden)
        result: torch.Tensor = self.last(hidden + self.mean.to(hidden))
        return result


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    rows = torch.randn(batch.rows, 8, generator=torch.Generator().manual_seed(batch.number))
    return model(rows.to(next(model.parameters())), batch.is_rare).float().square().sum() * batch.factor


def make_engine(processes: Processes, way: list[Any], folder: Path) -> Engine:
    precision, zero_stage, offload = way
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    file = folder / f"{processes.rank}.json"
    file.write_text(json.dumps({"zero_optimization": OFFLOADS[offload]} if offload else {}))
    options = RunOptions(
        precision=precision, zero_stage=zero_stage, gradient_accumulation_steps=2, deepspeed_config=str(file)
    )
    config = deepspeed_config(options, world_size=processes.world_size, on_gpu=processes.device.type == "cuda")
    engine = Engine(model, optimizer, config, processes)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(1 + processes.rank)
    return engine


def steps(engine: Engine, first: int, count: int) -> list[Any]:
    found: list[Any] = []
    for step in range(first, first + count):
        number, is_rare = step * 10 + engine.processes.rank * 2, step == first + 1 and first > 0
        result = engine.step([Batch(number), Batch(number + 1, is_rare=is_rare)], loss_sum)
        found.append((float(result.loss), float(result.grad_norm), result.applied))
    return found


def state(engine: Engine) -> dict[str, Any]:
    """All that a run goes on from, in lists."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    masters, kept = [], []
    for tensor, _, segments in wrapper_of(engine.optimizer).live(engine.optimizer):
        for value in (tensor, *engine.own_optimizer.state.get(tensor, {}).values()):
            flat = value.flatten().tolist()
            # Without what pads the part of the last rank, which can be anything.
            parts = [flat[each.start : each.start + each.length] for each in segments] if len(flat) > 1 else flat
            (masters if value is tensor else kept).append(parts)
    return {
        "weights": {name: stored.read().tolist() for name, stored in engine.weights().items()},
        "masters": masters,
        "optimizer": kept,
        "gradients": [parameter.grad is None for parameter in engine.module.parameters()],
        "buffers": [buffer.tolist() for buffer in engine.module.buffers()],
        "counters": [getattr(engine.deepspeed, name) for name in COUNTERS],
        "has linked": getattr(engine.optimizer, HAS_LINKED_STATES, None),
        "scale": {name: value for name, value in vars(scaler).items() if name != "dtype"} if scaler else None,
        "random": [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()],
        "random on the GPU": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
    }


def outcome(processes: Processes, way: list[Any], folder: Path, *, rehearses: bool) -> dict[str, Any]:
    """What comes of steps with a rehearsal before the first, or none, and with others in between."""
    engine = make_engine(processes, way, folder)
    count = FP16_STEPS if way[0] == "fp16" else STEPS
    before = state(engine)
    # The second overflows in fp16, whose loss scale is then lowered, and is not finite in the others.
    longest = [[Batch(7), Batch(8, 64, is_rare=True)], [Batch(9, 64, is_rare=True, factor=1e38), Batch(8)]]
    for micro_batches in longest if rehearses else []:
        rehearse(engine, micro_batches, loss_sum, state_bytes=8.0)
    found = {"at once": state(engine) == before, "steps": steps(engine, 0, count)}
    for micro_batches in longest if rehearses else []:
        rehearse(engine, micro_batches, loss_sum)
    return found | {"more steps": steps(engine, count, STEPS)} | state(engine)


def problems(processes: Processes, way: list[Any], folder: Path) -> list[str]:
    """What is not as without a rehearsal."""
    with_it, without = (outcome(processes, way, folder, rehearses=each) for each in (True, False))
    moved = without["optimizer"] and all(applied for *_, applied in without["more steps"])
    return [name for name in without if str(with_it[name]) != str(without[name])] + ["nothing is trained"] * (not moved)


try_ways(problems)
