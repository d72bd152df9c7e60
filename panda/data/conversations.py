"""The fields of a row, in the ways that people write conversations, as turns of system, user, assistant and tool."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from typing import Any

from panda.data.reading import Fields
from panda.data.reading import kind_of

_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character outside the basic plane: JSON can escape only one half, which no encoding can write."""


class UnusableRowError(ValueError):
    """A row that cannot be trained on, and why."""


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: str
    """system, user, assistant or tool"""
    text: str
    supervised: bool = True
    """For a turn of the assistant: whether it carries loss."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the message, by the names that chat templates use: those of EXTRAS, without nulls."""
    weight: float = 1.0
    """What the loss of its tokens is multiplied by, where it carries some."""

    def message(self) -> dict[str, Any]:
        """The turn as a chat template is given it. Reasoning has all the names that templates know it by."""
        reasoning = {name: self.extras[REASONING[0]] for name in REASONING if REASONING[0] in self.extras}
        return {"role": self.role, "content": self.text, **self.extras, **reasoning}


@dataclass(frozen=True)
class Conversation:
    """The turns of a row, and the tools that the assistant may call in them."""

    turns: list[Turn]
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of functions, as transformers' chat templates expect them: ``{"type": "function", ...}``."""


CONVERSATION_FIELDS = ("messages", "conversations", "conversation", "dialogue", "dialog")
"""Fields that hold a list of turns."""
ROLE_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value")
SYSTEM_FIELDS = ("system", "system_prompt")
TOOLS_FIELDS = ("tools", "functions")
ASKED_FIELDS = ("instruction", "prompt", "question", "query")
"""Fields of a single exchange that ask, of which the first is taken. A row may have only one of ABOUT_FIELDS."""
ABOUT_FIELDS = ("input", "context")
"""Fields with what is asked about, which are joined to the question, in this order."""
TARGET_FIELDS = ("target", "output", "completion", "response", "answer", "answers")
"""Fields that answer, of which the first is taken."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
CALLING_ROLES = ("function_call", "tool_call")
"""Roles of a turn whose text is a call in JSON: ShareGPT's and ms-swift's."""
CALLS_KEYS = ("tool_calls", "function_call")
"""Fields of a turn with calls: OpenAI's name, and its former one, of a single call."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of the reasoning before an answer; the first one is panda's."""
EXTRAS = ("name", "tool_call_id", "tool_plan")
"""Further fields of a message that chat templates read, besides reasoning and ``tool_calls``."""
SUPERVISED_FIELDS = ("weight", "train", "training", "loss")
"""Fields of a turn that say whether it carries loss: OpenAI's, axolotl's (two names), ms-swift's."""
TEXT_PARTS = ("text", "input_text", "output_text")


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
    found = ", ".join(repr(name) for name, value in dict(fields).items() if value is not None) or "none"
    return UnusableRowError(f"no field {' and no '.join(map(repr, names))}{instead}; its fields are: {found}")


def refuse_weight(fields: Mapping[str, Any]) -> None:
    """Raise UnusableRowError where the field ``weight`` of a row leaves it out, or is neither 0 nor 1."""
    fields = _noting(fields)
    if fields.has("weight") and not _is_on(fields, "weight"):
        raise UnusableRowError("its weight is 0")


def conversation_of(fields: Mapping[str, Any], input_field: str | None, target_field: str | None) -> Conversation:
    """The conversation in a row, from the fields that are named or else from those that are recognised.

    A field that is null counts as absent. Raises UnusableRowError where there is no answer to learn from. What is not
    used of ``fields`` is noted there, if they are ``Fields``: fields, and keys of turns by a path.
    """
    fields = _noting(fields)
    refuse_weight(fields)
    if input_field is not None and target_field is not None:
        absent = [name for name in (input_field, target_field) if name not in fields]
        if absent:
            raise missing(fields, absent)
        turns = [*_history(fields), *_said(fields, input_field, "user"), *_said(fields, target_field, "assistant")]
    elif name := next((name for name in CONVERSATION_FIELDS if fields.has(name)), None):
        turns = _turns(fields, name)
    else:
        turns = _exchange(fields)
    turns = _with_system(fields, turns)
    _refuse_without_answer(fields, turns, target_field)
    return Conversation(turns, _tools(fields))


def _refuse_without_answer(fields: Fields, turns: list[Turn], target_field: str | None) -> None:
    answers = [(number, turn) for number, turn in enumerate(turns, 1) if turn.role == "assistant"]
    if not answers:
        raise UnusableRowError("no turn of the assistant, so nothing to learn from")
    for number, turn in answers:
        if turn.supervised and not turn.text and "tool_calls" not in turn.extras:
            name = target_field or "target"
            where = f"field {name!r}" if name in fields and fields[name] == "" else f"turn {number}, an answer,"
            raise UnusableRowError(f"{where} is empty")
    if not any(turn.supervised for _, turn in answers):
        raise UnusableRowError("no turn of the assistant carries loss, by the weights of its turns")


# -- layouts ------------------------------------------------------------------------------------


def _exchange(fields: Fields) -> list[Turn]:
    target = next((name for name in TARGET_FIELDS if fields.has(name)), None)
    asked = next((name for name in ASKED_FIELDS if fields.has(name)), None)
    about = [name for name in ABOUT_FIELDS if fields.has(name)]
    if target is None or not (asked or about):
        raise _not_recognised(fields)
    if asked is None or isinstance(fields[asked], str):
        prompt = "\n".join(text for name in [asked, *about] if name and (text := text_of(fields, name)))
        before = [Turn("user", prompt)]
    else:
        before = _said(fields, asked, "user")
    return [*_history(fields), *before, *_said(fields, target, "assistant")]


def _not_recognised(fields: Fields) -> UnusableRowError:
    """The error for a row that lacks a question or an answer, which may be there but null."""
    needed = [*ASKED_FIELDS, *ABOUT_FIELDS] if any(map(fields.has, TARGET_FIELDS)) else [*TARGET_FIELDS]
    null = [name for name in needed if name in fields]
    if len(null) == 1:
        return UnusableRowError(f"field {null[0]!r} is null, not text")
    absent = [name for name in ("input", "target") if not fields.has(name)]
    others = (
        " (nor instruction/input/output, prompt/completion, question/answer or messages; input_field and target_field"
    )
    return missing(fields, absent or ["input", "target"], f"{others} name others)")


def _said(fields: Fields, name: str, role: str) -> list[Turn]:
    """The turns in field ``name``: one of ``role``, or a list of messages, of which those of a prompt carry no loss."""
    value = fields[name]
    if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        turns = _turns(fields, name)
        if role == "assistant":
            return turns
        return [replace(turn, supervised=False) if turn.role == "assistant" else turn for turn in turns]
    if name == "answers" and not isinstance(value, str):
        return [Turn(role, _first_answer(fields, name, value))]
    return [Turn(role, text_of(fields, name))]


def _first_answer(fields: Fields, name: str, value: Any) -> str:
    """The first of several answers: a list of texts, or SQuAD's ``{"text": [...], "answer_start": [...]}``."""
    path = name
    if isinstance(value, Mapping):
        inner = Fields(value)
        value, path = inner.get("text"), f"{name}.text"
        fields.leave_unread(name, inner)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise UnusableRowError(
            f"field {path!r} is {'empty' if value == [] else f'{kind_of(value)}, not a text or some'}"
        )
    if any(other != value[0] for other in value[1:]):
        fields.leave(f"{path}[1:]")
    return _inner_text(path, value[0])


def _history(fields: Fields) -> list[Turn]:
    """Earlier exchanges: LLaMA-Factory's list of pairs of user and assistant, or a list of messages."""
    if not fields.has("history"):
        return []
    value = fields["history"]
    if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        return _turns(fields, "history")
    pairs = [*value] if isinstance(value, list) else [value]
    turns = []
    for number, pair in enumerate(pairs, 1):
        if not (isinstance(value, list) and isinstance(pair, list) and len(pair) == 2):
            raise UnusableRowError("field 'history' is no list of pairs, each of what the user and the assistant said")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(Turn(role, _inner_text(f"history[{number}]", text)))
    return turns


def _with_system(fields: Fields, turns: list[Turn]) -> list[Turn]:
    """``turns`` after the system prompt that the row has beside them, if they do not begin with one."""
    given = [name for name in SYSTEM_FIELDS if fields.has(name)]
    for name in given:
        text = text_of(fields, name)
        if not text:
            continue
        if turns and turns[0].role == "system":
            if turns[0].text != text:
                fields.leave(name)
        else:
            turns = [Turn("system", text), *turns]
    return turns


# -- turns --------------------------------------------------------------------------------------


def _turns(fields: Fields, name: str) -> list[Turn]:
    value = fields[name]
    if not isinstance(value, list):
        raise UnusableRowError(f"field {name!r} is {kind_of(value)}, not an array of turns")
    turns = []
    for number, each in enumerate(value, 1):
        turn = Fields(each if isinstance(each, Mapping) else {})
        said_by = next((key for key in ROLE_KEYS if turn.has(key)), None)
        if said_by is None or not any(key in turn for key in (*TEXT_KEYS, *CALLS_KEYS)):
            names = "'role' and 'content', or with 'from' and 'value'"
            raise UnusableRowError(f"turn {number} of {name!r} is no object with {names}")
        try:
            turns.append(_turn(turn, turn[said_by]))
        except UnusableRowError as problem:
            raise UnusableRowError(f"turn {number} of {name!r}{problem}") from None
        fields.leave_unread(f"{name}[]", turn)
    return turns


def _turn(turn: Fields, said_by: Any) -> Turn:
    role = ROLES.get(said_by.lower()) if isinstance(said_by, str) else None
    if role is None:
        raise UnusableRowError(f" has the role {said_by!r}; the roles are: {', '.join(ROLES)}")
    try:
        extras = {name: text_of(turn, name) for name in EXTRAS if turn.has(name)}
        for name in REASONING:
            if turn.has(name) and (text := text_of(turn, name)) and extras.setdefault(REASONING[0], text) != text:
                turn.leave(name)
        text, calls = _text_and_calls(turn, role, said_by.lower())
        weight = _weight(turn, role)
        return Turn(role, text, weight > 0, extras | ({"tool_calls": calls} if calls else {}), weight or 1.0)
    except UnusableRowError as problem:
        raise UnusableRowError(f": {problem}") from None


def _text_and_calls(turn: Fields, role: str, said_by: str) -> tuple[str, list[dict[str, Any]]]:
    text_key = next((key for key in TEXT_KEYS if turn.has(key)), None)
    if text_key and said_by in CALLING_ROLES:
        return "", _tool_calls(turn, text_key)
    calls_key = next((key for key in CALLS_KEYS if turn.has(key)), None)
    if text_key is None and not (calls_key and role == "assistant"):
        raise UnusableRowError(
            f"field {next((key for key in TEXT_KEYS if key in turn), 'content')!r} is null, not text"
        )
    return _content(turn, text_key) if text_key else "", _tool_calls(turn, calls_key) if calls_key else []


def _weight(turn: Fields, role: str) -> float:
    """What the loss of ``turn`` counts, by its own fields. That a turn of another side does is not supported."""
    weight = 1.0
    for name in SUPERVISED_FIELDS:
        if turn.has(name):
            stated = _number(turn, name) if name == "weight" else float(_is_on(turn, name))
            if role == "assistant":
                weight *= stated
            elif stated:
                turn.leave(name)
    return weight


def _number(fields: Fields, name: str) -> float:
    value = fields[name]
    if not isinstance(value, (bool, int, float)) or not 0 <= value < math.inf:
        shown = value if isinstance(value, (int, float)) else kind_of(value)
        raise UnusableRowError(f"its {name} is {shown}: a weight is a number of at least 0")
    return float(value)


def _is_on(fields: Fields, name: str) -> bool:
    value = fields[name]
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        shown = value if isinstance(value, (int, float)) else kind_of(value)
        raise UnusableRowError(f"its {name} is {shown}: weights other than 0 and 1 are not supported")
    return bool(value)


def _content(turn: Fields, key: str) -> str:
    """The text of a turn, which may be given in parts."""
    value = turn[key]
    if not isinstance(value, list):
        return text_of(turn, key)
    texts = []
    for each in value:
        part = Fields(each if isinstance(each, Mapping) else {"type": "text", "text": each})
        kind = part.get("type") or "text"
        if kind not in TEXT_PARTS:
            raise UnusableRowError(f"field {key!r} has a part of type {kind!r}, and only parts of text are supported")
        texts.append(_inner_text(f"{key}[]", part.get("text")))
        turn.leave_unread(f"{key}[]", part)
    return "".join(texts)


# -- tools --------------------------------------------------------------------------------------


def _tools(fields: Fields) -> list[dict[str, Any]] | None:
    """The functions that a row offers, as a list or as JSON text, in the form that chat templates expect."""
    name = next((name for name in TOOLS_FIELDS if fields.has(name)), None)
    if name is None or not (value := _from_json(fields[name], name)):
        return None
    tools = []
    for each in value if isinstance(value, list) else [value]:
        tool = _plain(_object(_from_json(each, name), f"{name}[]"), name)
        tools.append({"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool)
    return tools


def _tool_calls(turn: Fields, key: str) -> list[dict[str, Any]]:
    """Calls of tools as chat templates expect them: ``{"type": "function", "function": {"name", "arguments"}}``.

    Arguments are objects, as transformers documents it: given as text, a template's ``tojson`` would quote them twice.
    """
    value = _from_json(turn[key], key)
    calls = []
    for each in value if isinstance(value, list) else [value]:
        call = Fields(_object(_from_json(each, key), f"{key}[]"))
        bare = not call.has("function")
        function = call if bare else Fields(_object(call["function"], f"{key}[].function"))
        name = _inner_text(f"{key}[].name", function.get("name"))
        given = next((each for each in ("arguments", "parameters") if function.has(each)), None)
        arguments = _from_json(function[given], given) if given and function[given] != "" else {}
        made = {"name": name, "arguments": _plain(_object(arguments, "arguments"), "arguments")}
        others = {each: _plain(call[each], each) for each in ("id", "type") if call.has(each)}
        calls.append({"type": "function"} | others | {"function": made})
        if not bare:
            call.leave_unread("function", function)
        turn.leave_unread(f"{key}[]", call)
    return calls


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UnusableRowError(f"field {name!r} is {kind_of(value)}, not an object")
    return value


def _from_json(value: Any, name: str) -> Any:
    """``value``, decoded where it is text, of JSON; empty text is nothing."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value, strict=False)
    except (ValueError, RecursionError) as problem:
        raise UnusableRowError(f"field {name!r} is no JSON: {problem}") from None


def _plain(value: Any, name: str) -> Any:
    """A copy of ``value`` without the keys of its objects that are null: in a Parquet file, each has the keys of all.

    Raises UnusableRowError where a text in it cannot be encoded.
    """
    try:
        if isinstance(value, Mapping):
            return {_plain(key, name): _plain(each, name) for key, each in value.items() if each is not None}
        if isinstance(value, list):
            return [_plain(each, name) for each in value]
    except RecursionError:
        raise UnusableRowError(f"field {name!r} is nested too deeply") from None
    return _inner_text(name, value) if isinstance(value, str) else value


def _inner_text(path: str, value: Any) -> str:
    return text_of({path: value}, path)


def _noting(fields: Mapping[str, Any]) -> Fields:
    return fields if isinstance(fields, Fields) else Fields(fields)
