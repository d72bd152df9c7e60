"""The ``rouge`` metric (C.-Y. Lin, 2004), as Google's package rouge-score computes it.

That package (0.1.2, of 2022, the last one) is not used: it keeps ASCII letters and digits only, so an answer in Chinese
or Greek has no words and scores 0, and it brings NLTK for a stemmer that is off. Of ASCII text all numbers are its own,
which a test compares.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from panda.answers.metric import Answer
from panda.answers.metric import Metric
from panda.answers.metric import MetricContext
from panda.answers.metric import of_each
from panda.answers.metric import register_metric
from panda.registry import NoOptions

_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Kana and Chinese characters, which no spaces divide into words."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


@register_metric("rouge")
def build_rouge(options: NoOptions, context: MetricContext) -> Metric:
    """ROUGE-1, ROUGE-2 and ROUGE-L: words, pairs of words and the longest sequence that both have, as F-measures."""
    return of_each(rouge, names=("rouge1", "rouge2", "rougeL"))


def rouge(answer: Answer) -> dict[str, float]:
    """``rouge1``, ``rouge2`` and ``rougeL`` of an answer, from 0 to 1."""
    found, expected = words(answer.text), words(answer.reference)
    scores = {f"rouge{size}": _shared(found, expected, size) for size in (1, 2)}
    return scores | {"rougeL": _f_measure(_longest_common(found, expected), len(found), len(expected))}


def words(text: str) -> list[str]:
    """The words of ``text`` in small letters: runs of letters and digits, and each Chinese character and kana."""
    return _WORD.findall(text.lower())


def _shared(found: Sequence[str], expected: Sequence[str], size: int) -> float:
    """The F-measure of the runs of ``size`` words that both have."""
    of_found, of_expected = (
        Counter(zip(*(text[start:] for start in range(size)), strict=False)) for text in (found, expected)
    )
    return _f_measure((of_found & of_expected).total(), of_found.total(), of_expected.total())


def _f_measure(common: int, found: int, expected: int) -> float:
    if not common:
        return 0.0
    precision, recall = common / found, common / expected
    return 2 * precision * recall / (precision + recall)


def _longest_common(found: Sequence[str], expected: Sequence[str]) -> int:
    """The length of the longest sequence of words that both have in this order, perhaps with others between."""
    lengths = [0] * (len(expected) + 1)
    for word in found:
        before = 0
        for place, other in enumerate(expected, 1):
            above = lengths[place]
            lengths[place] = before + 1 if word == other else max(above, lengths[place - 1])
            before = above
    return lengths[-1]
