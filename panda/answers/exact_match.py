"""The ``exact_match`` metric."""

from __future__ import annotations

from dataclasses import dataclass

from panda.answers.metric import Answer
from panda.answers.metric import Metric
from panda.answers.metric import MetricContext
from panda.answers.metric import of_each
from panda.answers.metric import register_metric


@dataclass(frozen=True)
class ExactMatchOptions:
    """Options of exact_match."""

    ignore_case: bool = False
    """Whether small and capital letters count as the same."""


@register_metric("exact_match", options=ExactMatchOptions)
def build_exact_match(options: ExactMatchOptions, context: MetricContext) -> Metric:
    """Share of answers that are the reference, but for white space at the beginning and the end."""

    def compared(text: str) -> str:
        return text.strip().casefold() if options.ignore_case else text.strip()

    def score(answer: Answer) -> dict[str, float]:
        return {"exact_match": float(compared(answer.text) == compared(answer.reference))}

    return of_each(score, names=("exact_match",))
