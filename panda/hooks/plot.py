"""The ``plot`` plugin: ``loss.png``, the curves of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING
from typing import Any

from panda.hooks.curves import Recorded
from panda.hooks.curves import draw_run
from panda.hooks.metrics import read_evaluations
from panda.hooks.metrics import read_metrics
from panda.registry import NoOptions
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext

if TYPE_CHECKING:
    from panda.runner import Run


@register_plugin("plot")
class Plot:
    """Draws loss.png when the run ends, in whatever way: losses, learning rate, gradient norm and skipped steps."""

    acts = False  # it only watches

    def __init__(self, options: NoOptions, context: PluginContext) -> None:
        self.records: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        if run.processes.rank == 0:
            self.records, self.evaluations = (
                [record for record in read(run.directory) if record["step"] <= run.step]
                for read in (read_metrics, read_evaluations)
            )

    @hookimpl
    def panda_log(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    @hookimpl
    def panda_evaluation(self, record: dict[str, Any]) -> None:
        self.evaluations.append(record)

    @hookimpl
    def panda_run_end(self, run: Run) -> None:
        self._draw(run)

    @hookimpl
    def panda_exception(self, run: Run) -> None:
        self._draw(run)

    def _draw(self, run: Run) -> None:
        if self.records:  # on rank 0
            recorded = Recorded(run.directory.name, self.records, self.evaluations)
            draw_run(recorded, run.directory / "loss.png", unit=run.task.unit)
