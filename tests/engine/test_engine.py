"""Steps that must change nothing, in every precision and ZeRO stage."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from panda.configuration.options import RunOptions
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.processes import Processes

WAYS = [("fp32", 0), ("fp32", 1), ("fp32", 3), ("bf16", 0), ("bf16", 1), ("bf16", 2)]


def make_engine(processes: Processes, precision: Any, zero_stage: int) -> Engine:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    options = RunOptions(precision=precision, zero_stage=zero_stage, gradient_accumulation_steps=2)
    return Engine(model, optimizer, deepspeed_config(options, world_size=1, on_gpu=False), processes)


class Batch:
    """Two rows of fours, and what their loss is multiplied by."""

    tokens = units = 2
    idle = False

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def to(self, device: torch.device) -> Batch:
        return self


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    inputs = torch.full((2, 4), 4.0, dtype=next(model.parameters()).dtype)
    result: torch.Tensor = model(inputs).float().sum() * batch.factor
    return result


@pytest.mark.parametrize(("precision", "zero_stage"), WAYS)
def test_a_step_that_is_not_finite_changes_nothing(processes: Processes, precision: str, zero_stage: int) -> None:
    with_it, without = (make_engine(processes, precision, zero_stage) for _ in range(2))
    good, bad = [Batch(1.0), Batch(2.0)], [Batch(1.0), Batch(math.nan)]
    results = [with_it.step(batches, loss_sum) for batches in (good, bad, good)]
    expected = [without.step(good, loss_sum) for _ in range(2)]
    assert [result.applied for result in results] == [True, False, True]
    assert math.isnan(results[1].loss) and not math.isfinite(results[1].grad_norm)
    assert [float(results[i].loss) for i in (0, 2)] == [float(result.loss) for result in expected]
    for name, stored in without.weights().items():
        assert torch.equal(stored.read(), with_it.weights()[name].read())


def test_bf16_gradients_are_added_to_the_fp32_sum_and_freed(processes: Processes) -> None:
    """Kept until the step, those of a 7B take 13 GB."""
    engine = make_engine(processes, "bf16", 1)
    held = []

    def also_look(model: Any, batch: Batch) -> torch.Tensor:
        held.append([parameter.grad for parameter in engine.module.parameters()])
        return loss_sum(model, batch)

    engine.step([Batch(1.0), Batch(2.0)], also_look)
    assert held == [[None] * 4] * 2  # before each backward pass


@pytest.mark.parametrize(("precision", "zero_stage"), WAYS)
def test_making_an_engine_takes_no_step(processes: Processes, precision: str, zero_stage: int) -> None:
    """DeepSpeed's 16-bit wrapper takes one with zero gradients, which decays weights and counts for bias correction."""
    torch.manual_seed(0)
    fresh = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)).state_dict()
    engine = make_engine(processes, precision, zero_stage)
    for name, stored in engine.weights().items():
        assert torch.equal(stored.read(), fresh[name].to(stored.dtype))
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    assert all(float(state["step"]) == 0 for state in inner.state.values() if "step" in state)


def test_an_engine_has_nothing_of_the_groups_of_one_before(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed keeps the groups of tensor parallelism of a run before in the same process."""
    from deepspeed.utils import groups

    monkeypatch.setattr(groups, "mpu", object())
    engine = make_engine(processes, "fp32", 1)
    assert engine.step([Batch(1.0), Batch(2.0)], loss_sum).applied
    assert groups.mpu is None
