"""Rows of preference data, in the layouts that are published, as conversations: what is asked, and how it is answered.

A pair is two answers to one prompt, of which one is preferred; a labelled answer is one that is desirable or not. What
nobody reads of a row is noted in its ``Fields``, which panda reports.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

from panda.data.conversations import Conversation
from panda.data.conversations import Turn
from panda.data.conversations import conversation_of
from panda.data.conversations import text_of
from panda.data.reading import Fields
from panda.tasks.text_task import UnusableRowError

ANSWERS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
)
"""Fields of the preferred answer and of the other: TRL's, Argilla's, OpenAI's."""
LABELS = ("label", "kto_tag")
"""Fields that say whether an answer is desirable: TRL's, LLaMA-Factory's."""
SPELT = {
    **dict.fromkeys(("true", "1", "desirable", "good", "chosen"), True),
    **dict.fromkeys(("false", "0", "undesirable", "bad", "rejected"), False),
}
"""Labels that are text, as in a CSV file, in lower case."""
CONVERSATIONS = ("messages", "conversations", "conversation")
"""Fields that hold a list of turns."""
BESIDE = ("system", "system_prompt", "tools", "functions")
"""Fields that a row may have beside its turns."""
TURNS = "messages"
"""The field that rows made here have their turns in."""
_SAID = "said"
"""The field of an answer in rows made here, and a stand-in for an answer where there is none yet."""


@dataclass(frozen=True)
class Answer:
    """A conversation that ends in an answer to learn from, or a text that is written as it stands."""

    text: Conversation | str
    """Only the turns of the answer carry loss. A text has no template around it."""


@dataclass(frozen=True)
class Pair:
    """Two answers to the same prompt."""

    chosen: Answer
    rejected: Answer
    margin: float | None = None
    """By how much the first is better, for a reward model."""


@dataclass(frozen=True)
class Labelled:
    """An answer, and whether it is a good one."""

    answer: Answer
    desirable: bool


@dataclass(frozen=True)
class FieldNames:
    """Names of fields where they are not the usual ones."""

    prompt: str | None = None
    chosen: str | None = None
    rejected: str | None = None


def pair_of(fields: Fields, names: FieldNames, *, has_margin: bool = False) -> Pair:
    """The pair in a row; with ``has_margin``, its margin too. Raises UnusableRowError where there is none."""
    chosen_name, rejected_name = answer_fields(fields, names)
    chosen, rejected = fields[chosen_name], fields[rejected_name]
    margin = _margin(fields) if has_margin else None
    if isinstance(chosen, str) and isinstance(rejected, str):
        if chosen == rejected:
            raise UnusableRowError(f"{chosen_name!r} and {rejected_name!r} are the same")
        if not _has_prompt(fields, names):
            texts = [text_of(fields, name) for name in (chosen_name, rejected_name)]
            for name, text in zip((chosen_name, rejected_name), texts, strict=True):
                if not text:
                    raise UnusableRowError(f"field {name!r} is empty")
            return _pair(texts, margin)
        both = [_answered(fields, names, [_message(fields, name)]) for name in (chosen_name, rejected_name)]
        return _pair(both, margin)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise UnusableRowError(f"one of {chosen_name!r} and {rejected_name!r} is text, and the other is not")
    turns = [_turns(fields, name) for name in (chosen_name, rejected_name)]
    shared = _shared(*turns)
    if all(shared == len(each) for each in turns):
        raise UnusableRowError(f"{chosen_name!r} and {rejected_name!r} are the same")
    if shared and turns[0][0].role != "assistant":
        _check_prompt(fields, names, turns[0][:shared], chosen_name)
        both = [_with_prompt(fields, each, shared) for each in turns]
    elif not _has_prompt(fields, names):
        raise UnusableRowError(f"no prompt, neither in a field nor before the answers in {chosen_name!r}")
    else:
        both = [_answered(fields, names, fields[name]) for name in (chosen_name, rejected_name)]
    return _pair(both, margin)


def _pair(answers: Sequence[Conversation | str], margin: float | None) -> Pair:
    chosen, rejected = answers
    return Pair(Answer(chosen), Answer(rejected), margin)


def labelled_of(fields: Fields, names: FieldNames) -> list[Labelled]:
    """The labelled answer in a row, or the two of a pair. Raises UnusableRowError where there is none."""
    label = next((name for name in LABELS if fields.has(name)), None)
    if label is None:
        if any(fields.has(name) for pair in ANSWERS for name in pair) or names.chosen:
            pair = pair_of(fields, names)
            return [Labelled(pair.chosen, True), Labelled(pair.rejected, False)]
        raise UnusableRowError(
            f"no field {' and no '.join(map(repr, LABELS))}, nor {ANSWERS[0][0]!r} and {ANSWERS[0][1]!r}; its fields"
            f" are: {', '.join(map(repr, _present(fields))) or 'none'}"
        )
    desirable = _label(fields, label)
    rest = {name: fields[name] for name in fields if name != label}
    conversation = _noted(fields, rest, names.prompt, None if names.prompt is None else "completion")
    last = max(number for number, turn in enumerate(conversation.turns) if turn.role == "assistant")
    if last != len(conversation.turns) - 1:
        raise UnusableRowError("its conversation does not end with an answer, which the label would be of")
    return [Labelled(Answer(_supervise(conversation, last)), desirable)]


def answer_fields(fields: Mapping[str, Any], names: FieldNames) -> tuple[str, str]:
    """The names of the fields of both answers. Raises UnusableRowError where the row lacks one."""
    named = (names.chosen, names.rejected)
    present = _present(fields)
    candidates = [(named[0], named[1])] if named[0] and named[1] else list(ANSWERS)
    for chosen, rejected in candidates:
        if chosen in present and rejected in present:
            return chosen, rejected
    absent = next(
        ([name for name in pair if name not in present] for pair in candidates if set(pair) & set(present)),
        list(candidates[0]),
    )
    others = "" if named[0] else " (chosen_field and rejected_field name others)"
    raise UnusableRowError(
        f"no field {' and no '.join(map(repr, absent))}{others}; its fields are:"
        f" {', '.join(map(repr, present)) or 'none'}"
    )


def _present(fields: Mapping[str, Any]) -> list[str]:
    has = getattr(fields, "has", lambda name: fields[name] is not None)
    return [name for name in fields if has(name)]


def _has_prompt(fields: Fields, names: FieldNames) -> bool:
    asking = ("prompt", "instruction", "question", "query", "input", "context", *CONVERSATIONS)
    return bool(names.prompt) or any(fields.has(name) for name in asking)


def _label(fields: Fields, name: str) -> bool:
    value = fields[name]
    if isinstance(value, str) and value.lower() in SPELT:
        return SPELT[value.lower()]
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise UnusableRowError(f"field {name!r} is {value!r}, not true or false (nor desirable or undesirable)")
    return bool(value)


def _margin(fields: Fields) -> float | None:
    if not fields.has("margin"):
        return None
    value = fields["margin"]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UnusableRowError(f"field 'margin' is {value!r}, not a number")
    return float(value)


# -- turns ---------------------------------------------------------------------------------------


def _message(fields: Fields, name: str) -> dict[str, str]:
    text = text_of(fields, name)
    if not text:
        raise UnusableRowError(f"field {name!r} is empty")
    return {"role": "assistant", "content": text}


def _turns(fields: Fields, name: str) -> list[Turn]:
    """The turns in field ``name``, a list of messages or one message."""
    value = fields[name]
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list) or not messages:
        raise UnusableRowError(f"field {name!r} is neither text nor messages")
    inner = Fields({TURNS: messages})
    try:
        turns = conversation_of(inner, None, None).turns
    except UnusableRowError as problem:
        raise UnusableRowError(f"field {name!r}: {problem}") from None
    for path in inner.unused():
        fields.leave(path.replace(TURNS, name, 1))
    return turns


def _shared(first: list[Turn], second: list[Turn]) -> int:
    """How many turns both begin with."""
    return next(
        (n for n, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )


def _check_prompt(fields: Fields, names: FieldNames, shared: list[Turn], chosen: str) -> None:
    """Raise UnusableRowError where the row has a prompt that is not what both answers begin with."""
    name = names.prompt or "prompt"
    if not fields.has(name):
        return
    value = fields[name]
    if isinstance(value, str):
        same = value in [turn.text for turn in shared]
    else:
        asked = _asked(Fields({TURNS: value}), TURNS)
        same = [(turn.role, turn.text) for turn in asked] == [(turn.role, turn.text) for turn in shared]
    if not same:
        raise UnusableRowError(f"{chosen!r} begins with a prompt of its own, which is not the row's {name!r}")


def _with_prompt(fields: Fields, turns: list[Turn], shared: int) -> Conversation:
    """A conversation whose first ``shared`` turns are the prompt, with the system prompt and tools of the row."""
    beside = {name: fields[name] for name in BESIDE if fields.has(name)}
    outer = conversation_of(Fields(beside | {"prompt": _SAID, "completion": _SAID}), None, None)
    for turn in outer.turns[:-2]:  # a system prompt beside the turns
        if turns[0].role != "system":
            turns, shared = [turn, *turns], shared + 1
        elif turns[0].text != turn.text:
            fields.leave(next(name for name in BESIDE if name in beside))
    return _supervise(Conversation(turns, outer.tools), shared)


def _asked(fields: Fields, name: str) -> list[Turn]:
    """The turns of a prompt that is a list of messages."""
    value = fields[name]
    if not isinstance(value, list):
        raise UnusableRowError(f"field {name!r} is neither text nor messages")
    return conversation_of(Fields({TURNS: [*value, {"role": "assistant", "content": _SAID}]}), None, None).turns[:-1]


def _answered(fields: Fields, names: FieldNames, answer: Any) -> Conversation:
    """The row's prompt, answered by ``answer``: a message, or several."""
    messages = [answer] if isinstance(answer, Mapping) else answer
    rest = {name: fields[name] for name in fields if name not in _answer_names(names) and fields.has(name)}
    nested = rest.get("input")
    if isinstance(nested, Mapping):  # OpenAI's: {"input": {"messages": [...], "tools": [...]}, ...}
        rest = {name: value for name, value in rest.items() if name != "input"} | dict(nested)
    listed = names.prompt or next((name for name in CONVERSATIONS if name in rest), None)
    if listed is None and isinstance(rest.get("prompt"), list):
        listed = "prompt"
    if listed is not None and isinstance(rest.get(listed), list):
        said = {name: value for name, value in rest.items() if name != listed}
        conversation = _noted(fields, said | {TURNS: [*rest[listed], *messages]}, None, None)
    elif names.prompt:
        conversation = _noted(fields, rest | {_SAID: messages}, names.prompt, _SAID)
    else:
        conversation = _noted(fields, rest | {"target": messages}, None, None)
    return _supervise(conversation, len(conversation.turns) - len(messages))


def _answer_names(names: FieldNames) -> set[str]:
    return {name for pair in ANSWERS for name in pair} | {names.chosen or "", names.rejected or "", "margin"}


def _noted(fields: Fields, row: dict[str, Any], asked: str | None, answered: str | None) -> Conversation:
    """The conversation of ``row``, a row made of ``fields``; what it does not use is noted there."""
    inner = Fields(row)
    conversation = conversation_of(inner, asked, answered)
    for path in inner.unused():
        fields.leave(path)
    return conversation


def _supervise(conversation: Conversation, start: int) -> Conversation:
    """The conversation with loss only on the answers from turn ``start`` on. Raises UnusableRowError for none."""
    turns = [
        replace(turn, supervised=turn.supervised and number >= start) if turn.role == "assistant" else turn
        for number, turn in enumerate(conversation.turns)
    ]
    if not any(turn.role == "assistant" and turn.supervised for turn in turns):
        raise UnusableRowError("no answer after the prompt, so nothing to learn from")
    return replace(conversation, turns=turns)
