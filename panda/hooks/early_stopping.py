"""The ``early_stopping`` plugin: ends a run whose evaluations no longer improve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

from panda.hooks.watched import Watched
from panda.registry import Meta
from panda.registry import OfEvaluations
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext

if TYPE_CHECKING:
    from panda.runner import Run


@dataclass(frozen=True)
class EarlyStoppingOptions:
    """Options of the early_stopping plugin."""

    early_stopping_patience: Annotated[int, Meta(ge=1)] = 3
    """Evaluations in a row that are no better than the best one before the run ends."""
    early_stopping_metric: Annotated[str, OfEvaluations()] = "eval_loss"
    """What evaluations are compared by: a number of their records."""
    early_stopping_higher_is_better: bool | None = None
    """Whether a higher value of it is the better one. By default as its task or metric states; else the lower one."""
    early_stopping_threshold: Annotated[float, Meta(ge=0)] = 0.0
    """By how much an evaluation has to be better to count."""


@register_plugin("early_stopping", options=EarlyStoppingOptions)
class EarlyStopping:
    """Ends the run where evaluations no longer improve. `--plugins early_stopping`."""

    def __init__(self, options: EarlyStoppingOptions, context: PluginContext) -> None:
        self.patience = options.early_stopping_patience
        self.watched = Watched(
            "early_stopping",
            options.early_stopping_metric,
            higher_is_better=options.early_stopping_higher_is_better,
            threshold=options.early_stopping_threshold,
        )

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        """A run that it has stopped, and that was killed before its export was complete, is stopped again."""
        self._stop_if_due(run)

    @hookimpl
    def panda_evaluation(self, run: Run, record: dict[str, Any]) -> None:
        self.watched.take(run, record)
        self._stop_if_due(run)

    def _stop_if_due(self, run: Run) -> None:
        if self.watched.since >= self.patience:
            times = "evaluation" if self.watched.since == 1 else "evaluations"
            run.stop(f"{self.watched}, and no better in the {self.watched.since} {times} since")

    @hookimpl
    def panda_save_state(self, run: Run) -> dict[str, Any]:
        return self.watched.state(run)

    @hookimpl
    def panda_load_state(self, run: Run, state: dict[str, Any]) -> None:
        self.watched.load(run, state)
