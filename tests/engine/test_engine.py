"""Steps that must change nothing, in every precision and ZeRO stage."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.utils import see_memory_usage

from panda.configuration.options import RunOptions
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.processes import Processes
from panda.registry import UserError
from panda.registry.contexts import Loss

WAYS = [("fp32", 0), ("fp32", 1), ("fp32", 3), ("bf16", 0), ("bf16", 1), ("bf16", 2)]
OFFLOADED = [("fp32", 2), ("bf16", 1), ("bf16", 2), ("bf16", 3)]


def make_engine(processes: Processes, precision: Any, zero_stage: int, file: Path | None = None) -> Engine:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    options = RunOptions(
        precision=precision,
        zero_stage=zero_stage,
        gradient_accumulation_steps=2,
        deepspeed_config=str(file) if file else None,
    )
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


@pytest.mark.parametrize(
    ("precision", "zero_stage", "offloaded"), [*((*way, False) for way in WAYS), *((*way, True) for way in OFFLOADED)]
)
def test_a_step_that_is_not_finite_changes_nothing(
    processes: Processes, tmp_path: Path, precision: str, zero_stage: int, offloaded: bool
) -> None:
    file = tmp_path / "offload.json"
    file.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}))
    with_it, without = (make_engine(processes, precision, zero_stage, file if offloaded else None) for _ in range(2))
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


@pytest.mark.parametrize(("precision", "zero_stage"), [*WAYS, ("bf16", 3)])
def test_deepspeed_neither_reports_memory_nor_collects_garbage(
    precision: Any,
    zero_stage: int,
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It did so for each group of parameters: with 80 layers for a minute."""
    calls: list[None] = []
    with monkeypatch.context() as patched:
        patched.setattr("deepspeed.runtime.utils.gc.collect", lambda *_: calls.append(None))
        make_engine(processes, precision, zero_stage)
    assert len(calls) <= 1  # ZeRO-3 does once
    assert capsys.readouterr().out == ""
    see_memory_usage("asked for", force=True)
    assert "asked for" in capsys.readouterr().out


class Stubborn(torch.nn.Linear):
    """A layer that stays in evaluation mode."""

    def train(self, mode: bool = True) -> Stubborn:
        return super().train(False)


def test_a_step_trains_in_training_mode_whoever_changed_it(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(processes, "fp32", 0)
    told = []
    train = engine.deepspeed.train
    monkeypatch.setattr(engine.deepspeed, "train", lambda: (told.append(True), train()))
    modes: list[list[bool]] = []

    def also_look(model: Any, batch: Batch) -> torch.Tensor:
        modes.append([part.training for part in engine.module.modules()])
        return loss_sum(model, batch)

    def step() -> int:
        told.clear()
        engine.step([Batch(1.0)], also_look)
        assert modes.pop() == [True] * 3
        return len(told)

    assert [step(), step()] == [0, 0], "its parts are only told if they are in another mode"
    engine.evaluating()
    assert [step(), step()] == [1, 0]
    next(engine.module.children()).eval()  # a plugin, say
    assert [step(), step()] == [1, 0]
    engine.module[0].__class__ = Stubborn
    engine.module.train()
    engine.step([Batch(1.0)], also_look)
    assert modes.pop() == [True, False, True]


def test_statistics_of_other_names_on_another_rank_are_refused() -> None:
    """Ranks would wait for each other, or add up what is not the same."""
    engine: Any = object.__new__(Engine)
    engine._agreed = {}
    others: list[Any] = [("kl", ())]
    engine.processes = SimpleNamespace(
        device=torch.device("cpu"), from_all=lambda mine: [mine, others], sum_=lambda tensor: tensor * 2
    )
    gathered = engine._gathered([Batch(1.0)], lambda module, here: {"kl": torch.tensor(1.0)}, None)
    assert gathered == {"kl": torch.tensor(2.0, dtype=torch.float64)}
    engine._agreed, others[0] = {}, ("reward", ())
    with pytest.raises(UserError, match=r"its statistics are others on other ranks: rank 0: .*kl.*; rank 1: .*reward"):
        engine._gathered([Batch(1.0)], lambda module, here: {"kl": torch.tensor(1.0)}, None)


def with_metric(*names: str) -> Any:
    """A loss with metrics of these names."""
    return lambda model, batch: Loss(loss_sum(model, batch), dict.fromkeys(names, (1.0, 2.0)))


def test_metrics_have_the_same_names_in_all_steps_and_evaluation_sets(processes: Processes) -> None:
    """Also where ranks agreed on them once: later ones would wait for each other, or be added up wrongly."""
    engine = make_engine(processes, "fp32", 0)
    assert engine.step([Batch(1.0)], with_metric("a", "b")).metrics.keys() == {"a", "b"}
    assert engine.evaluate([Batch(1.0)], with_metric("a")).pairs.keys() == {"a"}, "an evaluation may have others"
    assert engine.evaluate([], with_metric()).pairs.keys() == {"a"}
    again = "task: its metrics are {}, as it states or as they were before, and of another batch"
    with pytest.raises(UserError, match=again.format("a, b")):
        engine.step([Batch(1.0)], with_metric("a"))
    with pytest.raises(UserError, match=again.format("a")):
        engine.evaluate([Batch(1.0)], with_metric())
    stated = make_engine(processes, "fp32", 0)
    stated.stated_metrics = ("a", "b")
    with pytest.raises(UserError, match=again.format("a, b")):
        stated.step([Batch(1.0)], with_metric("a"))


def test_statistics_have_the_same_names_in_all_steps(processes: Processes) -> None:
    engine = make_engine(processes, "fp32", 0)
    found = [{"kl": torch.tensor(1.0)}, {"reward": torch.tensor(1.0)}]
    engine._gathered([Batch(1.0)], lambda module, here: found[0], None)
    with pytest.raises(UserError, match="task: its statistics were kl, and of another step they are reward"):
        engine._gathered([Batch(1.0)], lambda module, here: found[1], None)
