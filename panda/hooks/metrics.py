"""The ``metrics`` plugin: ``metrics.jsonl``, the records of the log and of evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from panda.hooks.closing import Closing
from panda.hooks.record_file import RecordFile
from panda.hooks.record_file import read_records
from panda.registry import NoOptions
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext
from panda.weights.run_folders import METRICS

if TYPE_CHECKING:
    from panda.runner import Run

FILE_NAME = METRICS


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """The log records of the run in ``directory``, in order. A value that was not a finite number is None."""
    return [record for record in read_records(Path(directory) / FILE_NAME) if "loss" in record]


def read_evaluations(directory: str | Path) -> list[dict[str, Any]]:
    """The records of the evaluations of the run in ``directory``, in order."""
    return [record for record in read_records(Path(directory) / FILE_NAME) if "eval_loss" in record]


@register_plugin("metrics")
class Metrics(Closing[RecordFile]):
    """Writes metrics.jsonl. A resumed run continues it after the step of its checkpoint."""

    def __init__(self, options: NoOptions, context: PluginContext) -> None:
        pass

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        if run.processes.rank == 0:
            self.opened = RecordFile(run.directory / FILE_NAME, run.step)

    @hookimpl
    def panda_log(self, record: dict[str, Any]) -> None:
        if self.opened is not None:
            self.opened.write(record)

    @hookimpl
    def panda_evaluation(self, run: Run, record: dict[str, Any]) -> None:
        if not run.evaluation_is_recorded:
            self.panda_log(record)
