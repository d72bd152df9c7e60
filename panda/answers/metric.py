"""The kind ``metric``: how good answers are beside those of the data. Any package can register metrics."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from panda.registry import decorator_for
from panda.registry import register_kind


@dataclass(frozen=True)
class Answer:
    """What a model answered to a sample."""

    prompt: str
    """The text of the prompt's tokens, as the model was given them."""
    text: str
    """Without special tokens."""
    reference: str
    """The answer in the data, without special tokens."""
    ended: bool
    """Whether it ended by itself, before it had as many tokens as it may have."""


@dataclass(frozen=True)
class MetricContext:
    """For the factory of a metric, after its options. Fields may be added."""

    tokenizer: Any
    """A transformers tokenizer."""


@register_kind("metric")
@dataclass(frozen=True)
class Metric:
    """What answers to evaluation data are scored by, beside the answers in the data.

    A factory of one takes its options and a ``MetricContext``.
    """

    score: Callable[[Sequence[Answer]], Mapping[str, float | Sequence[float]]]
    """From some answers, at least one, to numbers by name: of each answer one, of which the mean is recorded, or one of
    all answers together. Called on one rank, with the answers of all."""
    higher_is_better: bool = True
    """Whether a higher number is the better one: what `best_metric` and the like take it for."""
    names: tuple[str, ...] | None = None
    """The names that ``score`` gives, all of them: then a name in `best_metric` and the like is checked before the data
    is read. None where they are not known before there are answers."""


def of_each(
    score: Callable[[Answer], Mapping[str, float]],
    *,
    higher_is_better: bool = True,
    names: tuple[str, ...] | None = None,
) -> Metric:
    """The metric that ``score`` gives each answer. ``names``: those that it gives, if they are known."""

    def scores(answers: Sequence[Answer]) -> dict[str, list[float]]:
        found = [score(answer) for answer in answers]
        return {name: [each[name] for each in found] for name in found[0]}

    return Metric(scores, higher_is_better, names)


register_metric = decorator_for("metric")
"""``@register_metric("name", options=...)`` on ``factory(options, MetricContext) -> Metric``."""
