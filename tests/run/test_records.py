"""What log records say of the GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from panda.data.order import BatchPlan
from panda.engine.steps import Evaluated
from panda.hooks.progress import ProgressDisplay
from panda.registry import NoOptions
from panda.registry import UserError
from panda.registry.contexts import PluginContext
from panda.run.cards import Card
from panda.run.records import Gpu
from panda.run.records import evaluation_record
from panda.run.records import refuse_entries
from panda.run.records import refuse_sets
from panda.run.records import refuse_unit


def gpu_of(precision: str, name: str, monkeypatch: pytest.MonkeyPatch, device: str = "cuda") -> Gpu | None:
    peak = {"H100": 1e15}.get(name)
    monkeypatch.setattr("panda.run.records.this_card", lambda device: Card(name, 80 * 2**30, peak))
    processes = SimpleNamespace(device=torch.device(device), world_size=4)
    run: Any = SimpleNamespace(processes=processes, options=SimpleNamespace(precision=precision), flops_per_token=4e10)
    return Gpu.of(run)


def test_memory_is_the_peak_since_the_last_record(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks, reset = [50 * 2**30, 10 * 2**30], []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[len(reset)])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    gpu = gpu_of("bf16", "H100", monkeypatch)
    assert gpu is not None
    # 40,000 tokens a second of 4e10 operations, on four cards of 1e15.
    assert gpu.entries(40_000) == {"memory_gib": 50.0, "mfu": 0.4}
    assert gpu.entries(20_000) == {"memory_gib": 10.0, "mfu": 0.2}


@pytest.mark.parametrize(("precision", "name"), [("fp32", "H100"), ("bf16", "GB10")])
def test_without_a_known_peak_there_is_no_mfu(precision: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    gpu = gpu_of(precision, name, monkeypatch)
    assert gpu is not None and gpu.entries(40_000) == {"memory_gib": 1.0}


def evaluated(*metrics: str) -> Evaluated:
    pairs = {name: torch.tensor([1.0, 2.0]) for name in metrics}
    return Evaluated(torch.tensor(2.0), torch.tensor([6.0, 2.0]), pairs)


@pytest.mark.parametrize("name", ["pairs", "tokens", "learning_rate"])
def test_a_metric_that_would_replace_another_entry_is_refused(name: str) -> None:
    assert evaluation_record(3, {"": evaluated("margin")}, "pairs", 0.0)["eval_margin"] == 0.5
    with pytest.raises(UserError, match=f"a metric is called '{name}', like another entry of a record"):
        evaluation_record(3, {"": evaluated("margin", name)}, "pairs", 0.0)


def test_a_record_has_each_set_and_all_of_them() -> None:
    """The whole is over units, and not a mean of the sets."""
    sets = {
        "chat": Evaluated(torch.tensor(2.0), torch.tensor([6.0, 2.0]), {"margin": torch.tensor([1.0, 2.0])}),
        "code": Evaluated(torch.tensor(12.0), torch.tensor([9.0, 6.0]), {"margin": torch.tensor([0.0, 6.0])}),
    }
    record = evaluation_record(3, sets, "pairs", 0.0)
    record.pop("eval_seconds")
    assert record == {
        **{"step": 3, "eval_loss": 1.75, "eval_tokens": 15, "eval_pairs": 8, "eval_margin": 0.125},
        **{"eval_chat_loss": 1.0, "eval_chat_tokens": 6, "eval_chat_pairs": 2, "eval_chat_margin": 0.5},
        **{"eval_code_loss": 2.0, "eval_code_tokens": 9, "eval_code_pairs": 6, "eval_code_margin": 0.0},
    }


@pytest.mark.parametrize(("name", "entry"), [("supervised", "supervised_tokens"), ("chat", None)])
def test_a_set_whose_entries_would_replace_those_of_all_is_refused(name: str, entry: str | None) -> None:
    if entry is None:
        refuse_sets(["code", name], "supervised_tokens")
        return
    with pytest.raises(UserError, match=f"eval_names: '{name}': `eval_{entry}` is an entry of all sets"):
        refuse_sets(["code", name], "supervised_tokens")


def test_a_set_whose_entries_would_replace_a_metric_of_the_task_is_refused() -> None:
    found = Evaluated(torch.tensor(2.0), torch.tensor([6.0, 2.0]), {"nll_loss": torch.tensor([1.0, 2.0])})
    sets = {"nll": found, "x": found}
    with pytest.raises(UserError, match="eval_names: 'nll': its `eval_nll_loss` has the name of a metric of the task"):
        evaluation_record(3, sets, "pairs", 0.0)


@pytest.mark.parametrize("name", ["nll_loss", "nll_pairs", "tokens", "loss", "seconds"])
def test_a_score_that_has_the_name_of_another_entry_is_refused(name: str) -> None:
    refuse_entries(["rougeL", "nll_rougeL", "pairs_loss"], ["nll", "x"], "pairs")
    with pytest.raises(UserError, match=f"eval_metrics: a score is called '{name}', like another entry of a record"):
        refuse_entries(["rougeL", name], ["nll", "x"], "pairs")


def test_a_unit_that_would_replace_another_entry_is_refused() -> None:
    refuse_unit("pairs")
    with pytest.raises(UserError, match="its unit is called 'tokens', like another entry of a record"):
        refuse_unit("tokens")


def test_on_a_cpu_there_is_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_of("bf16", "H100", monkeypatch, device="cpu") is None


def test_the_progress_line_shows_both(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"step": 1, "loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1234.5}
    plan = BatchPlan(samples=8, micro_batch=4, accumulation=1, ranks=1, epochs=1)
    processes, task = SimpleNamespace(rank=0), SimpleNamespace(shown=())
    run: Any = SimpleNamespace(plan=plan, task=task, processes=processes, step=0)
    for more, shown in (({"memory_gib": 55.04, "mfu": 0.5312}, "MFU 53.1%  55.0 GiB  "), ({}, "")):
        display = ProgressDisplay(NoOptions(), PluginContext())
        display.panda_run_start(run)
        display.panda_log(run, {**record, **more})
        assert f"  1,234 tokens/s  {shown}lr 1.00e-03" in capsys.readouterr().out
        display.shown.close()
