"""The report, without a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from panda import UserError
from panda.registry.contexts import PluginContext
from panda.registry.options import build

from panda_example.report import Report
from panda_example.report import ReportOptions
from panda_example.report import report


def record(step: int, loss: float, seconds: float) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "tokens": 1000 * step,
        "supervised_tokens": 400 * step,
        "tokens_per_second": 1000 / seconds,
        "step_seconds": seconds,
    }


RECORDS = [record(12, float("nan"), 0.5), record(14, 1.25, 0.1), record(16, 1.5, 0.2)]


def test_report_says_what_the_records_say() -> None:
    text = report(RECORDS, "night-run", "complete", first_step=11, slowest=2)
    assert text.startswith("# night-run\n")
    for row in (
        "| steps | 11 to 16 |",
        "| best loss | 1.2500 at step 14 |",
        "| last loss | 1.5000 |",
        "| tokens | 16,000 since step 1, 6,400 with loss |",
        "| median tokens/s | 5,000 |",
        "| seconds | 1.6 |",
        "| 12 | 0.500 | 2,000 |\n| 16 | 0.200 | 5,000 |",
    ):
        assert row in text
    assert "slowest" not in report(RECORDS, "night-run", "complete", first_step=11, slowest=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_report_is_written_by_rank_0_however_the_run_ends(tmp_path: Path, rank: int) -> None:
    run: Any = SimpleNamespace(step=10, directory=tmp_path, processes=SimpleNamespace(rank=rank))
    plugin = Report(ReportOptions(report_file="page.md"), PluginContext())
    plugin.panda_run_start(run)
    for item in RECORDS if rank == 0 else []:
        plugin.panda_log(item)
    plugin.panda_exception(run, KeyboardInterrupt())
    assert (tmp_path / "page.md").exists() == (rank == 0)
    if rank == 0:
        assert "| run | ended by KeyboardInterrupt |" in (tmp_path / "page.md").read_text()
        plugin.panda_run_end(run)
        assert "| run | complete |" in (tmp_path / "page.md").read_text()


def test_options_have_bounds() -> None:
    with pytest.raises(UserError, match="report_slowest"):
        build(ReportOptions, {"report_slowest": -1})
