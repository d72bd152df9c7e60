"""The metrics that score answers, and what is made of what they give."""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from panda.answers.exact_match import ExactMatchOptions
from panda.answers.exact_match import build_exact_match
from panda.answers.metric import Answer
from panda.answers.metric import Metric
from panda.answers.metric import MetricContext
from panda.answers.metric import of_each
from panda.answers.rouge import build_rouge
from panda.answers.rouge import words
from panda.answers.scored import scored
from panda.registry import NoOptions
from panda.registry import UserError

CONTEXT = MetricContext(tokenizer=None)


def answer(text: str, reference: str) -> Answer:
    return Answer("", text, reference, ended=True)


def test_rouge_is_that_of_rouge_score() -> None:
    """``rouge_score.json``: of random pairs, by Google's rouge-score 0.1.2 without its stemmer."""
    rows = json.loads(Path(__file__).with_name("rouge_score.json").read_text())
    found = build_rouge(NoOptions(), CONTEXT).score([answer(row["text"], row["reference"]) for row in rows])
    assert found == {name: [row["scores"][name] for row in rows] for name in ("rouge1", "rouge2", "rougeL")}
    assert len({row["scores"]["rougeL"] for row in rows}) > 30


def test_rouge_has_words_in_other_writings() -> None:
    assert words("熊猫吃Bamboo 竹子。") == ["熊", "猫", "吃", "bamboo", "竹", "子"]
    assert words("Ένα café, снова_и") == ["ένα", "café", "снова", "и"]
    found = build_rouge(NoOptions(), CONTEXT).score([answer("熊猫吃竹子", "熊猫爱竹子")])
    assert found["rougeL"] == [pytest.approx(0.8)]


@pytest.mark.parametrize(("ignore_case", "expected"), [(False, [1.0, 0.0, 0.0]), (True, [1.0, 1.0, 0.0])])
def test_exact_match(ignore_case: bool, expected: list[float]) -> None:
    metric = build_exact_match(ExactMatchOptions(ignore_case), CONTEXT)
    answers = [answer(" red panda\n", "red panda"), answer("Red", "red"), answer("redpanda", "red panda")]
    assert metric.score(answers) == {"exact_match": expected}


def test_scores_of_each_answer_and_of_all() -> None:
    whole = Metric(lambda answers: {"answers": len(answers)})
    lengths = of_each(lambda each: {"length": float(len(each.text))})
    found = scored({"whole": whole, "lengths": lengths}, [answer("a", ""), answer("bcd", "")])
    assert found.scores == {"answers": 2.0, "length": 2.0}
    assert found.of_each == [{"length": 1.0}, {"length": 3.0}]


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (lambda answers: {"x": [1.0]}, "metric 'odd' gave 'x' as [1.0] for 2 answers; it has to give each a number"),
        (lambda answers: {"x": ["a", "b"]}, "metric 'odd' gave 'x' as ['a', 'b'] for 2 answers"),
        (lambda answers: {"a b": 1.0}, "metric 'odd' gave 'a b': no name of a metric"),
        (lambda answers: {"length": 1.0}, "metric 'odd' gave 'length': two metrics have that name"),
    ],
)
def test_what_is_no_score_is_refused(score: Callable[[Sequence[Answer]], Any], said: str) -> None:
    lengths = of_each(lambda each: {"length": float(len(each.text))})
    with pytest.raises(UserError) as error:
        scored({"lengths": lengths, "odd": Metric(score)}, [answer("a", ""), answer("b", "")])
    assert said in str(error.value)
