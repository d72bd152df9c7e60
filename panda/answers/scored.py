"""Answers of a model and what metrics give them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from numbers import Real
from typing import Any

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
    higher_is_better: set[str] = field(default_factory=set)
    """Names of scores of which a higher one is the better."""


def scored(metrics: Mapping[str, Metric], answers: Sequence[Answer]) -> Scored:
    """What ``metrics``, by name, give ``answers``, at least one. Raises UserError for what is no such number."""
    found = Scored({}, [{} for _ in answers])
    for metric, each in metrics.items():
        given = each.score(answers)
        if each.names is not None and {*given} != {*each.names}:
            raise UserError(
                f"metric {metric!r} gave {', '.join(given) or 'nothing'}, and its `names` are {', '.join(each.names)}."
                " State what it gives."
            )
        for name, value in given.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name in found.scores:
                problem = "two metrics have that name" if name in found.scores else "no name of a metric"
                raise UserError(f"metric {metric!r} gave {name!r}: {problem}. Name it otherwise.")
            found.scores[name], of_each = _numbers(metric, name, value, len(answers))
            if each.higher_is_better:
                found.higher_is_better.add(name)
            for of_answer, number in zip(found.of_each, of_each, strict=False):
                of_answer[name] = number
    return found


def _numbers(metric: str, name: str, value: Any, answers: int) -> tuple[float, list[float]]:
    """The number of all answers, and those of each, if ``metric`` gives each one."""
    if isinstance(value, Real):
        return float(value), []
    numbers = list(value) if isinstance(value, Iterable) else []
    if len(numbers) != answers or not all(isinstance(number, Real) for number in numbers):
        raise UserError(
            f"metric {metric!r} gave {name!r} as {value!r:.60} for {answers} answers; it has to give each a number, or"
            " one number for all."
        )
    return math.fsum(numbers) / answers, [float(number) for number in numbers]
