"""The fields of a row, in the ways that people write conversations, as turns of system, user and assistant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from panda.data.reading import kind_of

_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character outside the basic plane: JSON can escape only one half, which no encoding can write."""


class UnusableRowError(ValueError):
    """A row that cannot be trained on, and why."""


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: str
    """system, user or assistant"""
    text: str
    supervised: bool = True
    extras: Mapping[str, Any] = field(default_factory=dict)

    def message(self) -> dict[str, Any]:
        return {"role": self.role, "content": self.text, **self.extras}


@dataclass(frozen=True)
class Conversation:
    """Turns."""

    turns: list[Turn]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Shape:
    """Field names of a single exchange, as some public data sets have them."""

    prompt: tuple[str, ...]
    """Fields that are joined, in this order, to the prompt; a row has at least one of them."""
    target: str


SHAPES = (
    Shape(("instruction", "input"), "target"),
    Shape(("instruction", "input"), "output"),
    Shape(("instruction", "context"), "response"),
    Shape(("prompt",), "completion"),
    Shape(("prompt",), "response"),
    Shape(("question",), "answer"),
)
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
CONVERSATION_FIELDS = {"messages": ("role", "content"), "conversations": ("from", "value")}
"""Fields that hold a list of turns, with the names of role and text in each."""


def text_of(fields: Mapping[str, Any], name: str) -> str:
    """The text in field ``name``. Raises UnusableRowError where there is none."""
    value = fields[name]
    if not isinstance(value, str):
        raise UnusableRowError(f"field {name!r} is {kind_of(value)}, not text")
    if half := _SURROGATE.search(value):
        raise UnusableRowError(f"field {name!r} has half a surrogate pair, {half.group()!r}, which is not text")
    return value


def missing(fields: Mapping[str, Any], names: list[str], instead: str = "") -> UnusableRowError:
    """The error for a row that lacks the fields ``names``."""
    found = ", ".join(map(repr, fields)) or "none"
    return UnusableRowError(f"no field {' and no '.join(map(repr, names))}{instead}; its fields are: {found}")


def conversation_of(fields: Mapping[str, Any], input_field: str | None, target_field: str | None) -> Conversation:
    """The turns of a row, from the fields that are named or else from those that are recognised.

    Raises UnusableRowError where there is no answer to learn from.
    """
    if input_field is not None and target_field is not None:
        absent = [name for name in (input_field, target_field) if name not in fields]
        if absent:
            raise missing(fields, absent)
        turns = [Turn("user", text_of(fields, input_field)), Turn("assistant", text_of(fields, target_field))]
    else:
        for name, keys in CONVERSATION_FIELDS.items():
            if name in fields:
                turns = _turns(name, fields[name], *keys)
                break
        else:
            turns = _exchange(fields)
    for number, turn in enumerate(turns, 1):
        if turn.role == "assistant" and not turn.text:
            where = "field 'target'" if target_field is None and "target" in fields else f"turn {number}, an answer,"
            raise UnusableRowError(f"{f'field {target_field!r}' if target_field else where} is empty")
    if all(turn.role != "assistant" for turn in turns):
        raise UnusableRowError("no turn of the assistant, so nothing to learn from")
    return Conversation(turns)


def _exchange(fields: Mapping[str, Any]) -> list[Turn]:
    for shape in SHAPES:
        present = [name for name in shape.prompt if name in fields]
        if shape.target in fields and present:
            # A part of the prompt that is null is left out where there is another one, as for Alpaca's `input`.
            given = [name for name in present if fields[name] is not None] or present
            prompt = "\n".join(text for name in given if (text := text_of(fields, name)))
            turns = [Turn("user", prompt), Turn("assistant", text_of(fields, shape.target))]
            if fields.get("system"):
                turns.insert(0, Turn("system", text_of(fields, "system")))
            return turns
    absent = [name for name in ("input", "target") if name not in fields]
    others = (
        " (nor instruction/input/output, prompt/completion, question/answer or messages; input_field and target_field"
    )
    raise missing(fields, absent or ["input", "target"], f"{others} name others)")


def _turns(name: str, value: Any, role_key: str, text_key: str) -> list[Turn]:
    if not isinstance(value, list):
        raise UnusableRowError(f"field {name!r} is {kind_of(value)}, not an array of turns")
    turns = []
    for number, each in enumerate(value, 1):
        if not isinstance(each, Mapping) or role_key not in each or text_key not in each:
            raise UnusableRowError(f"turn {number} of {name!r} is no object with {role_key!r} and {text_key!r}")
        role = ROLES.get(each[role_key]) if isinstance(each[role_key], str) else None
        if role is None:
            known = ", ".join(ROLES)
            raise UnusableRowError(f"turn {number} of {name!r} has the role {each[role_key]!r}; the roles are: {known}")
        try:
            turns.append(Turn(role, text_of(each, text_key)))
        except UnusableRowError as problem:
            raise UnusableRowError(f"turn {number} of {name!r}: {problem}") from None
    return turns
