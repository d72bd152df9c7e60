"""A metric of evaluations, its best value so far, and how long ago that was."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from typing import Any

from panda.registry import UserError

if TYPE_CHECKING:
    from panda.runner import Run


class Watched:
    """The best value of a metric. A value that is not a number is never better."""

    def __init__(self, plugin: str, metric: str, *, higher_is_better: bool = False, threshold: float = 0.0) -> None:
        """``threshold``: by how much a value has to be better than the best so far to count."""
        self.plugin, self.metric = plugin, metric
        self.higher_is_better, self.threshold = higher_is_better, threshold
        self.best: float | None = None
        self.best_step = 0
        self.since = 0
        """Evaluations since the best one, or since this was last set to 0."""

    def take(self, run: Run, record: dict[str, Any]) -> bool:
        """Whether the evaluation in ``record`` is the best so far. Raises UserError where it lacks the metric."""
        if self.metric not in record:
            names = ", ".join(name for name in record if name.startswith("eval_"))
            raise UserError(f"{self.plugin}: evaluations have no metric {self.metric!r}. They have: {names}.")
        value = record[self.metric]
        if math.isnan(value):
            better = False
        elif self.best is None:
            better = True
        else:
            gained = value - self.best if self.higher_is_better else self.best - value
            better = gained > self.threshold
        if better:
            self.best, self.best_step, self.since = value, run.step, 0
        else:
            self.since += 1
        return better

    def __str__(self) -> str:
        best = "no number yet" if self.best is None else f"{self.best:.4g} at step {self.best_step}"
        return f"{self.metric} has been {best} at best"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"metric": self.metric, "best": self.best, "best_step": self.best_step, "since": self.since}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; afresh where that is of another metric."""
        if state["metric"] == self.metric:
            self.best, self.best_step, self.since = state["best"], state["best_step"], state["since"]
