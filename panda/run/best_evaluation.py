"""What the evaluations of a run are compared by, which was the best, and of which step the weights are that it has."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panda.engine.checkpoints.folders import BEST
from panda.engine.checkpoints.folders import named_in
from panda.engine.checkpoints.folders import step_of
from panda.run.description import read_provenance
from panda.run.directory import configuration_in
from panda.weights.run_folders import CARD_MARK
from panda.weights.run_folders import CHECKPOINTS
from panda.weights.run_folders import EXPORT

_STEPS = re.compile(r"^- steps: ([\d,]+)", re.MULTILINE)
"""As ``model_card`` writes it."""


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run."""

    metric: str
    """What evaluations are compared by: ``eval_loss``, or what ``best_metric`` names."""
    higher: bool
    """Whether the highest value is the best one."""
    value: float
    step: int

    @property
    def place(self) -> float:
        """The lower, the better."""
        return -self.value if self.higher else self.value

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.4f} at step {self.step:,}"


def compared_by(run: Path) -> tuple[str, bool]:
    """What the evaluations of ``run``, a run directory, are compared by, and whether the highest value is the best."""
    # Where two components have a key, it is written with the name of its component.
    config = {key.rpartition(".")[2]: value for key, value in configuration_in(run).items()}
    metric, higher = config.get("best_metric"), config.get("best_higher_is_better")
    if not isinstance(metric, str):
        return "eval_loss", False
    stated = read_provenance(run).get("evaluation_metrics")
    if not isinstance(higher, bool):
        higher = isinstance(stated, dict) and stated.get(metric) == "higher"
    return metric, higher


def best_evaluation(run: Path, evaluations: Sequence[Mapping[str, Any]]) -> Best | None:
    """The best of the ``evaluations`` of ``run``; None where none has a finite value."""
    metric, higher = compared_by(run)
    found = [Best(metric, higher, each[metric], each["step"]) for each in evaluations if is_finite(each.get(metric))]
    return min(found, key=lambda each: each.place, default=None)


def is_finite(value: Any) -> bool:
    """Whether ``value``, of a record, is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def best_checkpoint(run: Path, best: Best) -> Path | None:
    """The checkpoint of the ``best`` evaluation of ``run`` that the plugin ``best_checkpoint`` keeps; None for none."""
    found = named_in(run / CHECKPOINTS / BEST)
    return found if found.is_dir() and step_of(found) == best.step else None


def exported_step(run: Path) -> int | None:
    """The step after which the weights in the export of ``run`` were; None where that is not known.

    Its card says so, which is panda's until the user writes another.
    """
    try:
        card = (run / EXPORT / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        card = ""
    stated = _STEPS.search(card) if CARD_MARK in card else None
    return int(stated[1].replace(",", "")) if stated else None


def ended_step(run: Path) -> int | None:
    """The step at which ``run`` has ended; where it has gone on since, at which an earlier start did. None for none."""
    provenance = read_provenance(run)
    earlier = provenance.get("earlier_starts")
    starts = [provenance, *reversed(earlier if isinstance(earlier, list) else [])]
    ends = [start.get("end") for start in starts if isinstance(start, dict)]
    return next((end["step"] for end in ends if isinstance(end, dict) and isinstance(end.get("step"), int)), None)
