"""Which samples of evaluation data are asked, and what is compared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from panda.answers.scored import Scored
from panda.registry import UserError
from panda.run.questions import Question
from panda.run.questions import questions_of
from panda.run.questions import refuse_without_questions
from panda.run.questions import scores_of_sets

END = 2
TASK: Any = SimpleNamespace(question=lambda sample: sample)
SAMPLES: Any = [([5, number], [6, number + 10, END, 9]) for number in range(10)]


def test_samples_are_spread_over_each_set_and_references_end_before_their_end() -> None:
    found = questions_of(TASK, {"many": SAMPLES, "few": SAMPLES[:2]}, 4, [END], None)
    assert [(each.of, each.sample) for each in found.asked] == [
        *(("many", number) for number in (0, 2, 5, 7)),
        *(("few", number) for number in (0, 1)),
    ]
    assert found.asked[1] == Question("many", 2, [5, 2], [6, 12]) and found.notes == []


def test_samples_that_are_not_asked_are_reported() -> None:
    data: Any = [None, ([5] * 9, [6, END]), ([5], [6, END]), None]
    found = questions_of(TASK, {"chat": data}, 4, [END], 8)
    assert [each.sample for each in found.asked] == [2]
    assert found.notes == [
        "chat: 2 of 4 samples have no prompt with an answer",
        "chat: 1 of 4 prompts have more than 8 tokens, and leave an answer no positions of the model",
    ]
    with pytest.raises(UserError, match=r"no evaluation sample has a prompt and an answer to compare with \(1 of 1"):
        refuse_without_questions(questions_of(TASK, {"": data[:1]}, 4, [END], None), "pretrain")


def test_scores_of_sets_have_names_of_their_own() -> None:
    whole, exact = Scored({"rouge": 1.0, "exact_match": 2.0}, []), Scored({"rouge": 3.0, "match": 4.0}, [])
    assert scores_of_sets({"": whole, "chat": exact}) == {
        **{"rouge": 1.0, "exact_match": 2.0, "chat_rouge": 3.0, "chat_match": 4.0}
    }
    with pytest.raises(UserError, match="eval_names: 'exact': the score 'match' of this set would be called `eval_ex"):
        scores_of_sets({"": whole, "exact": exact})
