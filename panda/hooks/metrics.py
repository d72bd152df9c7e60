"""The ``metrics`` plugin: ``metrics.jsonl``, one JSON object a log record, on disk as soon as it is known."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from typing import TextIO

from panda.registry import NoOptions
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext

if TYPE_CHECKING:
    from panda.runner import Run

FILE_NAME = "metrics.jsonl"


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The records of the run in ``directory``, in order. A last line that was cut off is left out.

    A value that was not a finite number is None.
    """
    path = directory / FILE_NAME
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


@register_plugin("metrics")
class Metrics:
    """Writes metrics.jsonl. A resumed run continues it from its checkpoint's step on."""

    def __init__(self, options: NoOptions, context: PluginContext) -> None:
        self.file: TextIO | None = None

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        if run.processes.rank == 0:
            # Steps that the interrupted run logged behind its last checkpoint are taken again.
            kept = [record for record in read_metrics(run.directory) if record["step"] <= run.step]
            path = run.directory / FILE_NAME
            rewritten = path.with_suffix(".tmp")
            rewritten.write_text("".join(map(_line, kept)), encoding="utf-8")
            rewritten.replace(path)  # at once: no moment to die at has fewer records
            self.file = path.open("a", encoding="utf-8")

    @hookimpl
    def panda_log(self, record: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(_line(record))
            self.file.flush()

    @hookimpl
    def panda_run_end(self) -> None:
        self._close()

    @hookimpl
    def panda_exception(self) -> None:
        self._close()

    def _close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def _line(record: dict[str, Any]) -> str:
    """JSON has no NaN and no infinity: those become null."""
    finite = {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
