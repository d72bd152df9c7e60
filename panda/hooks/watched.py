"""A metric of evaluations, its best value so far, and how long ago that was."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from typing import Any

from panda.files.activity import say
from panda.files.terminal import printable_line
from panda.registry import UserError

if TYPE_CHECKING:
    from panda.runner import Run


class Watched:
    """The best value of a metric. One that is not finite is never better, nor one that is equal."""

    def __init__(
        self, plugin: str, metric: str, *, higher_is_better: bool | None = None, threshold: float = 0.0
    ) -> None:
        """``higher_is_better``: None for what the run knows of the metric, and otherwise lower.

        ``threshold``: by how much a value has to be better than the best so far to count. Raises UserError for a metric
        that no evaluation has.
        """
        if not metric.startswith("eval_"):
            raise UserError(
                f"{plugin}: {metric!r} is no metric of evaluations, whose names begin with `eval_`, as eval_loss: did"
                f" you mean 'eval_{metric}'?"
            )
        self.plugin, self.metric = plugin, metric
        self.higher_is_better, self.threshold = higher_is_better, threshold
        self.best: float | None = None
        self.best_step = 0
        self.since = 0
        """Evaluations since the best one, or since this was last set to 0."""
        self.said = False
        """Whether it has been printed which way is better."""

    def take(self, run: Run, record: dict[str, Any]) -> bool:
        """Whether the evaluation in ``record`` is the best so far. One that lacks the metric ends the run."""
        if self.metric not in record:
            self._end(run, [name for name in record if name.startswith("eval_")])
            return False
        value, higher = record[self.metric], self._higher_is_better(run)
        if not math.isfinite(value):
            better = False
        elif self.best is None:
            better = True
        else:
            gained = value - self.best if higher else self.best - value
            better = gained > self.threshold
        if better:
            self.best, self.best_step, self.since = value, run.step, 0
        else:
            self.since += 1
        return better

    def _end(self, run: Run, known: list[str]) -> None:
        """End ``run``, whose evaluations have the ``known`` numbers, in good order: what it has learned is kept."""
        names = ", ".join(known)
        problem = f"evaluations have no {self.metric!r}. They have: {names}"
        run.stop(problem)
        if run.step >= run.plan.total_steps and run.processes.rank == 0:  # it ends anyway, and says nothing of stopping
            say(printable_line(f"note: {self.plugin} has done nothing: {problem}"))

    def _higher_is_better(self, run: Run) -> bool:
        if self.higher_is_better is not None:
            return self.higher_is_better
        higher = self.metric in run.higher_is_better
        if not self.said and not self.metric.endswith("_loss") and run.processes.rank == 0:
            say(f"note: {self.plugin}: the {'highest' if higher else 'lowest'} {self.metric} is taken for the best")
        self.said = True
        return higher

    def __str__(self) -> str:
        best = "no number yet" if self.best is None else f"{self.best:.4g} at step {self.best_step}"
        return f"{self.metric} has been {best} at best"

    def state(self, run: Run) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        found = {"metric": self.metric, "best": self.best, "best_step": self.best_step, "since": self.since}
        return {**found, "held_out": run.held_out}

    def load(self, run: Run, state: dict[str, Any]) -> None:
        """Go on from ``state``; afresh where that is of another metric, or of other held-out data."""
        if state["metric"] != self.metric:
            return
        if state.get("held_out", run.held_out) == run.held_out:  # states of before 2026-11-28 lack it
            self.best, self.best_step, self.since = state["best"], state["best_step"], state["since"]
        elif run.processes.rank == 0 and run.resumed_from is not None:
            until = run.resumed_from.name
            say(f"note: {self.plugin}: evaluations until {until} were on other held-out data: it starts afresh")
