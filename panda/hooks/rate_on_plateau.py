"""The ``rate_on_plateau`` plugin: lowers the learning rate where evaluations no longer improve."""

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
class PlateauOptions:
    """Options of the rate_on_plateau plugin."""

    plateau_factor: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    """What the learning rate is multiplied by, besides the schedule."""
    plateau_patience: Annotated[int, Meta(ge=1)] = 2
    """Evaluations in a row that are no better than the best one before the rate is lowered."""
    plateau_metric: Annotated[str, OfEvaluations()] = "eval_loss"
    """What evaluations are compared by: a number of their records."""
    plateau_higher_is_better: bool | None = None
    """Whether a higher value of it is the better one. By default as its task or metric states; else the lower one."""
    plateau_threshold: Annotated[float, Meta(ge=0)] = 0.0
    """By how much an evaluation has to be better to count."""
    plateau_smallest_factor: Annotated[float, Meta(gt=0, le=1)] = 0.01
    """The least that remains of the schedule's rate."""


@register_plugin("rate_on_plateau", options=PlateauOptions)
class RateOnPlateau:
    """Lowers the learning rate where evaluations no longer improve. `--plugins rate_on_plateau`."""

    def __init__(self, options: PlateauOptions, context: PluginContext) -> None:
        self.options = options
        self.factor = 1.0
        self.watched = Watched(
            "rate_on_plateau",
            options.plateau_metric,
            higher_is_better=options.plateau_higher_is_better,
            threshold=options.plateau_threshold,
        )

    @hookimpl
    def panda_evaluation(self, run: Run, record: dict[str, Any]) -> None:
        if self.watched.take(run, record) or self.watched.since < self.options.plateau_patience:
            return
        self.watched.since = 0
        lowered = max(self.factor * self.options.plateau_factor, self.options.plateau_smallest_factor)
        if lowered < self.factor:
            run.scale_learning_rate(lowered / self.factor)
            self.factor = lowered
            if run.processes.rank == 0:
                print(f"rate_on_plateau: {self.watched}: from here on {lowered:g} of the schedule's rate", flush=True)

    @hookimpl
    def panda_save_state(self, run: Run) -> dict[str, Any]:
        return {**self.watched.state(run), "factor": self.factor}

    @hookimpl
    def panda_load_state(self, run: Run, state: dict[str, Any]) -> None:
        self.watched.load(run, state)
        self.factor = state["factor"]  # the run goes on with it
