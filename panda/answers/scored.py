"""Answers of a model and what metrics give them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass

from panda.answers.metric import Answer
from panda.answers.metric import Metric
from panda.registry import UserError


@dataclass(frozen=True)
class Scored:
    """What metrics give some answers."""

    scores: dict[str, float]
    """By name, of all answers: of what is given to each the mean."""
    of_each: list[dict[str, float]]
    """Of each answer."""


def scored(metrics: Mapping[str, Metric], answers: Sequence[Answer]) -> Scored:
    """What ``metrics``, by name, give ``answers``, at least one. Raises UserError for what is no such number."""
    found = Scored({}, [{} for _ in answers])
    for metric, each in metrics.items():
        for name, value in each.score(answers).items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name in found.scores:
                problem = "two metrics have that name" if name in found.scores else "no name of a metric"
                raise UserError(f"metric {metric!r} gave {name!r}: {problem}. Name it otherwise.")
            numbers = [value] if isinstance(value, int | float) else [*value]
            is_one = isinstance(value, int | float)
            if not all(isinstance(number, int | float) for number in numbers) or len(numbers) != len(answers) > is_one:
                raise UserError(
                    f"metric {metric!r} gave {name!r} as {value!r:.60} for {len(answers)} answers; it has to give each"
                    " a number, or one number for all."
                )
            found.scores[name] = math.fsum(numbers) / len(numbers)
            if not is_one:
                for of_answer, number in zip(found.of_each, numbers, strict=True):
                    of_answer[name] = float(number)
    return found
