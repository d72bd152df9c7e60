"""The ``report`` plugin: a run on one page, to paste into an issue or a pull request."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

from panda import Meta
from panda import hookimpl
from panda import register_plugin
from panda.registry.contexts import PluginContext

if TYPE_CHECKING:
    from panda.runner import Run


@dataclass(frozen=True)
class ReportOptions:
    """Options of the report."""

    report_file: str = "report.md"
    """Name of the report in the run directory."""
    report_slowest: Annotated[int, Meta(ge=0)] = 3
    """How many of the slowest log records to list; each is the mean over `logging_steps` steps."""


@register_plugin("report", options=ReportOptions)
class Report:
    """Writes report.md when the run ends, however it ends: best loss, median speed, tokens, slowest steps."""

    def __init__(self, options: ReportOptions, context: PluginContext) -> None:
        self.options = options
        self.first_step = 0
        self.records: list[dict[str, Any]] = []

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        self.first_step = run.step + 1  # of a resumed run, the records before this step are not known here

    @hookimpl
    def panda_log(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    @hookimpl
    def panda_run_end(self, run: Run) -> None:
        self._write(run, "complete")

    @hookimpl
    def panda_exception(self, run: Run, error: BaseException) -> None:
        self._write(run, f"ended by {type(error).__name__}")

    def _write(self, run: Run, ending: str) -> None:
        if run.processes.rank == 0 and self.records:
            text = report(self.records, run.directory.name, ending, self.first_step, self.options.report_slowest)
            (run.directory / self.options.report_file).write_text(text, encoding="utf-8")


def report(records: list[dict[str, Any]], title: str, ending: str, first_step: int, slowest: int) -> str:
    """The report as Markdown. ``records`` are those of panda_log, at least one, in order."""
    # NaN compares as neither less nor greater than any number: it must not be the best loss.
    best = min(records, key=lambda record: record["loss"] if record["loss"] == record["loss"] else float("inf"))
    last = records[-1]
    steps_before = [first_step - 1, *(record["step"] for record in records[:-1])]
    seconds = sum(
        record["step_seconds"] * (record["step"] - before) for record, before in zip(records, steps_before, strict=True)
    )
    rows = {
        "run": ending,
        "steps": f"{first_step:,} to {last['step']:,}",
        "best loss": f"{best['loss']:.4f} at step {best['step']:,}",
        "last loss": f"{last['loss']:.4f}",
        "tokens": f"{last['tokens']:,} since step 1, {last['supervised_tokens']:,} with loss",
        "median tokens/s": f"{median(record['tokens_per_second'] for record in records):,.0f}",
        "seconds": f"{seconds:,.1f}",
    }
    lines = [f"# {title}", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    if slowest:
        lines += ["", "| slowest, at step | seconds a step | tokens/s |", "|---|---|---|"]
        for record in sorted(records, key=lambda record: -record["step_seconds"])[:slowest]:
            lines.append(f"| {record['step']:,} | {record['step_seconds']:.3f} | {record['tokens_per_second']:,.0f} |")
    return "\n".join(lines) + "\n"
