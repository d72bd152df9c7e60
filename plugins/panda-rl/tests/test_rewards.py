"""The rewards that come with the package."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from panda import UserError
from panda.registry.options import build

from panda_rl.reward import Completion
from panda_rl.reward import RewardContext
from panda_rl.rewards import LastNumberOptions
from panda_rl.rewards import LengthOptions
from panda_rl.rewards import PatternOptions
from panda_rl.rewards import build_last_number
from panda_rl.rewards import build_length
from panda_rl.rewards import build_pattern
from panda_rl.rewards import last_number

CONTEXT = RewardContext(tokenizer=None, max_completion_length=20)


def completion(text: str, tokens: int = 3, **fields: Any) -> Completion:
    return Completion(text, tuple(range(tokens)), True, "?", fields)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 12.", 12),
        ("first 3, then -4", -4),
        ("$1,234.50 in all", Fraction(2469, 2)),
        ("#### 72", 72),
        ("0.10", Fraction(1, 10)),
        (".5", Fraction(1, 2)),
        ("5-3", 3),  # a minus after a digit is no sign
        ("x2 and H2O", None),
        ("no number", None),
        ("", None),
        ("12.", 12),
        ("1, 2", 2),
        ("٣", None),
    ],
)
def test_the_last_number_is_read_exactly(text: str, number: Any) -> None:
    assert last_number(text) == number


def test_last_number_compares_numbers_and_not_texts() -> None:
    reward = build_last_number(build(LastNumberOptions, {}), CONTEXT)
    scored = [
        completion("so 72.0 apples", answer="He has 48 + 24 = 72. #### 72"),
        completion("72, or 73", answer="#### 72"),
        completion("none", answer="#### 72"),
        completion("1000", answer="1,000"),
        completion("it is 7", answer=7),
    ]
    assert list(reward.score(scored)) == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert reward.fields == ("answer",)
    assert reward.problem_of({"answer": "#### 72"}) is None
    assert "has no number" in str(reward.problem_of({"answer": "many"}))
    assert build_last_number(build(LastNumberOptions, {"number_field": "sum"}), CONTEXT).fields == ("sum",)


def test_pattern_matches_anywhere_unless_it_says_where() -> None:
    scored = [completion("<think>a\nb</think>\n5"), completion("5"), completion("a 5")]
    anywhere = build_pattern(build(PatternOptions, {"pattern": "5"}), CONTEXT)
    assert list(anywhere.score(scored)) == [1.0, 1.0, 1.0]
    whole = build_pattern(build(PatternOptions, {"pattern": r"^<think>.*</think>\n\d$"}), CONTEXT)
    assert list(whole.score(scored)) == [1.0, 0.0, 0.0]
    assert whole.fields == () and whole.problem_of({}) is None
    with pytest.raises(UserError, match=r"pattern: '\(' is not a regular expression"):
        build(PatternOptions, {"pattern": "("})


@pytest.mark.parametrize(
    ("unit", "scores"),
    [("tokens", [0.75, 1.0, 0.0]), ("characters", [0.5, 0.0, 0.0]), ("words", [0.25, 0.5, 0.0])],
)
def test_length_falls_off_on_both_sides(unit: str, scores: list[float]) -> None:
    reward = build_length(build(LengthOptions, {"length_target": 4, "length_unit": unit}), CONTEXT)
    scored = [completion("ab", 3), completion("two words", 4), completion("", 9)]
    assert list(reward.score(scored)) == scores


def test_a_length_that_no_completion_can_have_is_refused() -> None:
    with pytest.raises(UserError, match="30 tokens are more than max_completion_length, 20"):
        build_length(build(LengthOptions, {"length_target": 30}), CONTEXT)
    build_length(build(LengthOptions, {"length_target": 30, "length_unit": "characters"}), CONTEXT)
