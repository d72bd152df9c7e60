"""The kind ``reward``: what a completion is worth. Any package can register rewards with ``register_reward``."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from panda import decorator_for
from panda import register_kind


@dataclass(frozen=True)
class Completion:
    """What the model wrote after a prompt."""

    text: str
    """Without special tokens."""
    token_ids: Sequence[int]
    """With the token that ended it, if one did."""
    ended: bool
    """Whether it ended by itself, before it had ``max_completion_length`` tokens."""
    prompt: str
    """The text of the prompt's tokens, as the model was given them."""
    fields: Mapping[str, Any]
    """Those fields of the row that some reward reads."""


@dataclass(frozen=True)
class RewardContext:
    """For the factory of a reward, after its options. Fields may be added."""

    tokenizer: Any
    """A transformers tokenizer."""
    max_completion_length: int
    """The most tokens of a completion."""


@register_kind("reward")
@dataclass(frozen=True)
class Reward:
    """What a completion is worth: a number for each of several completions, higher for better.

    A factory of one takes its options and a ``RewardContext``. It is called with completions of one rank, all of a
    step or some, so what it says of one must not depend on the others.
    """

    score: Callable[[Sequence[Completion]], Sequence[float]]
    fields: tuple[str, ...] = ()
    """Fields of a row that it reads: a row without them is reported, and not trained on."""
    problem_of: Callable[[Mapping[str, Any]], str | None] = lambda fields: None
    """What is wrong with the fields of a row, so that it is reported and not trained on; None if it can be scored."""


def of_each(score: Callable[[Completion], float], **others: Any) -> Reward:
    """The reward that ``score`` gives each completion; ``others`` are the other fields of ``Reward``."""
    return Reward(lambda completions: [score(completion) for completion in completions], **others)


register_reward = decorator_for("reward")
"""``@register_reward("name", options=...)`` on ``factory(options, RewardContext) -> Reward``."""
