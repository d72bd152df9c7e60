"""The rewards that come with this package. Each is a small function of a completion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated
from typing import Any
from typing import Literal

from panda import Meta
from panda import UserError

from panda_rl.reward import Completion
from panda_rl.reward import Reward
from panda_rl.reward import RewardContext
from panda_rl.reward import of_each
from panda_rl.reward import register_reward

_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?|(?<![\w.])-?\.\d+", re.ASCII)


def last_number(text: str) -> Fraction | None:
    """The last number in ``text``, ``1,234.50`` or ``-3``, exactly; None where there is none."""
    found = _NUMBER.findall(text)
    return Fraction(found[-1].replace(",", "")) if found else None


@dataclass(frozen=True)
class LastNumberOptions:
    """Options of last-number."""

    number_field: str = "answer"
    """Field of a row whose last number is the right one, as GSM8K's "... #### 72"; it may be a number, too."""


@register_reward("last-number", options=LastNumberOptions)
def build_last_number(options: LastNumberOptions, context: RewardContext) -> Reward:
    """1 if the last number of the completion equals that of the row's answer, else 0."""

    name = options.number_field

    def score(completion: Completion) -> float:
        return float(last_number(completion.text) == last_number(str(completion.fields[name])))

    def problem_of(fields: Mapping[str, Any]) -> str | None:
        has_one = last_number(str(fields[name])) is not None
        return None if has_one else f"field {name!r} has no number, which reward last-number asks for"

    return of_each(score, fields=(name,), problem_of=problem_of)


@dataclass(frozen=True)
class PatternOptions:
    """Options of pattern."""

    pattern: Annotated[str, Meta(min_length=1)]
    """Regular expression that has to match somewhere in the completion: `^` and `$` make it the whole, of all lines."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as problem:
            raise UserError(f"pattern: {self.pattern!r} is not a regular expression: {problem}.") from None


@register_reward("pattern", options=PatternOptions)
def build_pattern(options: PatternOptions, context: RewardContext) -> Reward:
    """1 if a regular expression matches in the completion, else 0."""
    pattern = re.compile(options.pattern, re.DOTALL)
    return of_each(lambda completion: float(pattern.search(completion.text) is not None))


@dataclass(frozen=True)
class LengthOptions:
    """Options of length."""

    length_target: Annotated[int, Meta(ge=1)]
    """The length that is worth 1; one of 0, or of twice as much or more, is worth 0."""
    length_unit: Literal["tokens", "characters", "words"] = "tokens"
    """What is counted; of tokens also the one that ends a completion."""


@register_reward("length", options=LengthOptions)
def build_length(options: LengthOptions, context: RewardContext) -> Reward:
    """1 for a completion of the length that is asked for, less the more it is longer or shorter, down to 0."""
    if options.length_unit == "tokens" and options.length_target > context.max_completion_length:
        raise UserError(
            f"length_target: {options.length_target} tokens are more than max_completion_length,"
            f" {context.max_completion_length}. Lower it, or raise max_completion_length."
        )

    def score(completion: Completion) -> float:
        counted = {"tokens": completion.token_ids, "characters": completion.text, "words": completion.text.split()}
        off = abs(len(counted[options.length_unit]) - options.length_target)
        return max(0.0, 1.0 - off / options.length_target)

    return of_each(score)
