"""The ``layers`` plugin: ``layers.jsonl``, what the optimizer reports of each parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING
from typing import Any

from panda.hooks.record_file import RecordFile
from panda.registry import NoOptions
from panda.registry import UserError
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext

if TYPE_CHECKING:
    from panda.runner import Run

FILE_NAME = "layers.jsonl"


@register_plugin("layers")
class Layers:
    """Writes layers.jsonl: trust ratios and the like by parameter, at each log record. `--plugins layers`."""

    acts = False  # it only watches

    def __init__(self, options: NoOptions, context: PluginContext) -> None:
        self.file: RecordFile | None = None

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        if not run.engine.optimizer_observes:
            raise UserError(
                f"plugins: layers: the optimizer {run.options.optimizer} reports nothing of single parameters;"
                " nvlamb does."
            )
        if run.processes.rank == 0:
            self.file = RecordFile(run.directory / FILE_NAME, run.step)

    @hookimpl
    def panda_log(self, run: Run, record: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write({"step": record["step"], **run.observations})
