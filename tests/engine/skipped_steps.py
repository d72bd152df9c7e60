"""Steps that are skipped on two ranks, in each of the ways that the argument names; prints what was not as expected.

python skipped_steps.py '[["bf16", 2, "offload", "nan"], ...]'

One rank of two has a batch whose loss is NaN, infinite (with finite gradients), or a hundred times as large, which a
judge then finds by its loss. The same engine without that step has to end with the same bits, with dropout.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from ways_on_ranks import try_ways

from panda.configuration.options import RunOptions
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.processes import Processes

OFFLOADS = {"": {}, "offload": {"offload_optimizer": {"device": "cpu"}}}
STEPS = 8
"""Of which one is bad."""
MOST_LOSS = 0.1
"""Between that of the steps, and of the bad one where it spikes: on a CPU and on a GPU, which draws another dropout."""
BAD = 4
SEARCH = 24
"""Steps before them, all alike, in which fp16 finds its loss scale."""


class Batch:
    """Rows whose loss is multiplied by ``factor``, and to which ``added`` is added."""

    idle = False
    tokens = units = 3
    real = None

    def __init__(self, number: int, factor: float = 1.0, added: float = 0.0) -> None:
        self.number, self.factor, self.added = number, factor, added

    def to(self, device: torch.device) -> Batch:
        return self


BADS = {"nan": {"factor": math.nan}, "inf": {"added": math.inf}, "spike": {"factor": 100.0}}


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(batch.number))
    found = model(rows.to(next(model.parameters()))).float().square().sum()
    result: torch.Tensor = found * batch.factor + batch.added
    return result


def make_engine(processes: Processes, precision: Any, zero_stage: int, offload: str, folder: Path) -> Engine:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 8), torch.nn.Linear(8, 1)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    file = folder / f"{processes.rank}.json"
    file.write_text(json.dumps({"zero_optimization": OFFLOADS[offload]} if offload else {}))
    options = RunOptions(
        precision=precision,
        zero_stage=zero_stage,
        gradient_accumulation_steps=2,
        deepspeed_config=str(file),
    )
    config = deepspeed_config(options, world_size=processes.world_size, on_gpu=processes.device.type == "cuda")
    engine = Engine(model, optimizer, config, processes)
    torch.manual_seed(1 + processes.rank)
    return engine


def trained(engine: Engine, kind: str, *, with_bad: bool) -> tuple[list[bool], list[float], dict[str, torch.Tensor]]:
    """Whether each step was taken, their losses, and the weights at the end."""
    rank, applied, losses = engine.processes.rank, [], []
    asked: list[bool] = []

    def judge(loss: torch.Tensor, grad_norm: Any) -> bool:
        asked.append(math.isfinite(float(loss)) and math.isfinite(float(grad_norm)))
        return float(loss) < MOST_LOSS

    fp16 = engine.config["fp16"]["enabled"]
    for step in range(-SEARCH if fp16 else 0, STEPS):
        if step == BAD and not with_bad:
            continue
        bad = BADS[kind] if step == BAD and rank == 1 else {}
        numbers = [max(step, -1) * 10 + rank * 2 + each for each in range(2)]
        micro_batches = [Batch(1000 + numbers[0]), Batch(1000 + numbers[1], **bad)]
        result = engine.step(micro_batches, loss_sum, None, judge)
        if step >= 0:
            applied.append(result.applied)
            losses.append(float(result.loss))
    applied += [] if all(asked) else [False]  # a judge is asked of steps that are finite only
    return applied, losses, {name: stored.read() for name, stored in engine.weights().items()}


def problems(processes: Processes, way: list[Any], folder: Path) -> str:
    """What was not as expected; empty for nothing."""
    precision, zero_stage, offload, kind = way
    found = trained(make_engine(processes, precision, zero_stage, offload, folder), kind, with_bad=True)
    expected = trained(make_engine(processes, precision, zero_stage, offload, folder), kind, with_bad=False)
    applied, losses, weights = found
    wrong = []
    if applied != [step != BAD for step in range(STEPS)]:
        wrong.append(f"taken: {applied}")
    if kind != "spike" and math.isfinite(losses[BAD]):
        wrong.append(f"loss {losses[BAD]}")
    if losses[:BAD] + losses[BAD + 1 :] != expected[1]:
        wrong.append(f"losses {losses} without it {expected[1]}")
    different = [name for name, weight in expected[2].items() if not torch.equal(weights[name], weight)]
    if different or not all(bool(torch.isfinite(weight).all()) for weight in weights.values()):
        wrong.append(f"other weights: {different}")
    return "; ".join(wrong)


try_ways(problems)
