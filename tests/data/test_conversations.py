"""Rows as people write them: each becomes the turns that it says, and what is not used of it is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from panda.data.conversations import Conversation
from panda.data.conversations import Turn
from panda.data.conversations import UnusableRowError
from panda.data.conversations import conversation_of
from panda.data.parquet_reader import ParquetReader
from panda.data.reading import Fields
from panda.data.reading import Row
from panda.registry import NoOptions
from panda.registry.contexts import ReaderContext

USER, ANSWER = Turn("user", "1 + 1?"), Turn("assistant", "2")
ASKED = {"role": "user", "content": "1 + 1?"}
ANSWERED = {"role": "assistant", "content": "2"}
ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
CALL = {"name": "add", "arguments": {"a": 1}}
CALLED = [{"type": "function", "function": CALL}]
FUNCTION = [{"type": "function", "function": ADD}]


def read(row: dict[str, Any], *named: str) -> tuple[Conversation, list[str]]:
    """The conversation in ``row``, and which of its fields were not used."""
    fields = Fields(row)
    conversation = conversation_of(fields, *(named or (None, None)))
    return conversation, fields.unused()


def answering(**fields: Any) -> dict[str, Any]:
    """A row of messages, with further fields in the answer."""
    return {"messages": [ASKED, ANSWERED | fields]}


def told(text: str) -> list[Turn]:
    return [Turn("system", text), USER, ANSWER]


LAYOUTS: dict[str, tuple[dict[str, Any], list[Turn]]] = {
    "input and target": ({"input": "1 + 1?", "target": "2"}, [USER, ANSWER]),
    "Alpaca": ({"instruction": "1 + 1?", "input": "", "output": "2"}, [USER, ANSWER]),
    "Alpaca with input": (
        {"instruction": "Add.", "input": "1, 1", "output": "2"},
        [Turn("user", "Add.\n1, 1"), ANSWER],
    ),
    "Alpaca with system and history": (
        {"instruction": "1 + 1?", "input": "", "output": "2", "system": "S", "history": [["a", "b"], ["c", "d"]]},
        [
            Turn("system", "S"),
            *(Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")),
            *(USER, ANSWER),
        ],
    ),
    "history of messages": (
        {"query": "1 + 1?", "response": "2", "history": [{"role": "user", "content": "a"}]},
        [Turn("user", "a"), USER, ANSWER],
    ),
    "Dolly": (
        {"instruction": "1 + 1?", "context": "Sums.", "response": "2"},
        [Turn("user", "1 + 1?\nSums."), ANSWER],
    ),
    "GSM8K": ({"question": "1 + 1?", "answer": "2"}, [USER, ANSWER]),
    "question with context": (
        {"question": "1 + 1?", "context": "Sums.", "answer": "2"},
        [Turn("user", "1 + 1?\nSums."), ANSWER],
    ),
    "SQuAD": (
        {"question": "1 + 1?", "context": "Sums.", "answers": {"text": ["2", "2"]}},
        [Turn("user", "1 + 1?\nSums."), ANSWER],
    ),
    "answers": ({"question": "1 + 1?", "answers": ["2"]}, [USER, ANSWER]),
    "OpenOrca": ({"system_prompt": "S", "question": "1 + 1?", "response": "2"}, told("S")),
    "ms-swift": ({"system": "S", "query": "1 + 1?", "response": "2"}, told("S")),
    "TRL as text": ({"prompt": "1 + 1?", "completion": "2"}, [USER, ANSWER]),
    "TRL as messages": (
        {"prompt": [ASKED, {"role": "assistant", "content": "3"}, ASKED], "completion": [ANSWERED]},
        [USER, Turn("assistant", "3", supervised=False), USER, ANSWER],
    ),
    "OpenAI": ({"messages": [{"role": "developer", "content": "S"}, ASKED, ANSWERED]}, told("S")),
    "system beside messages": ({"system": "S", "messages": [ASKED, ANSWERED]}, told("S")),
    "the same system twice": (
        {"system": "S", "messages": [{"role": "system", "content": "S"}, ASKED, ANSWERED]},
        told("S"),
    ),
    "an empty system": ({"system": "", "messages": [ASKED, ANSWERED]}, [USER, ANSWER]),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}], "system": "S"},
        told("S"),
    ),
    "mixed keys": (
        {"conversation": [{"role": "User", "value": "1 + 1?"}, {"from": "chatgpt", "content": "2"}]},
        [USER, ANSWER],
    ),
    "dialogue": ({"dialogue": [ASKED, ANSWERED | {"role": "model"}]}, [USER, ANSWER]),
    "ShareGPT's tools": (
        {
            "conversations": [
                {"from": "human", "value": "1 + 1?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "2"},
            ]
        },
        [USER, Turn("assistant", "", extras={"tool_calls": CALLED}), Turn("tool", "2"), ANSWER],
    ),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "1 +"}, " 1?"]}, ANSWERED]},
        [USER, ANSWER],
    ),
    "a tool's answer": (
        {"messages": [{"role": "tool", "content": "2", "tool_call_id": "x", "name": "add"}, ANSWERED]},
        [Turn("tool", "2", extras={"name": "add", "tool_call_id": "x"}), ANSWER],
    ),
    "a call without text": (
        {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": CALLED}]},
        [USER, Turn("assistant", "", extras={"tool_calls": CALLED})],
    ),
    "weights": (
        {"weight": 1, "messages": [ASKED | {"weight": 0}, ANSWERED | {"weight": 0}, ANSWERED | {"weight": 1.0}]},
        [USER, Turn("assistant", "2", supervised=False), ANSWER],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_its_turns_and_leaves_nothing_unused(name: str) -> None:
    row, turns = LAYOUTS[name]
    assert read(row) == (Conversation(turns), [])


@given(st.data(), st.sampled_from(sorted(LAYOUTS)), st.lists(st.sampled_from(sorted(LAYOUTS)), max_size=4))
def test_a_union_of_layouts_is_read_as_the_layout_that_is_not_null(data: Any, name: str, others: list[str]) -> None:
    """As in a Parquet file, where each row and each turn has the keys of all of them, in any order."""
    row, turns = LAYOUTS[name]
    columns = {key: None for other in others for key in LAYOUTS[other][0]} | {"meta": None} | row
    keys_of_turns = ("role", "content", "from", "value", "weight", "train", "tool_calls", "name", "thinking", "id")
    for key, value in columns.items():
        if isinstance(value, list) and all(isinstance(each, dict) for each in value):
            columns[key] = [dict.fromkeys(keys_of_turns) | each for each in value]
    shuffled = {key: columns[key] for key in data.draw(st.permutations(sorted(columns)))}
    assert read(shuffled) == (Conversation(turns), [])


NAMES = st.sampled_from(["id", "source", "weight", "system", "history", "tools", "context", "input", "train", "name"])
VALUES = st.one_of(st.none(), st.just(1), st.text(max_size=3), st.lists(st.text(max_size=2), max_size=2))


@given(st.sampled_from(sorted(LAYOUTS)), st.dictionaries(NAMES, VALUES, max_size=4))
def test_a_further_field_is_used_or_reported_or_the_row_is(name: str, further: dict[str, Any]) -> None:
    row, _ = LAYOUTS[name]
    fields = Fields(further | row)
    try:
        conversation = conversation_of(fields, None, None)
    except UnusableRowError:
        return
    unused = set(fields.unused())
    for key, value in (further | row).items():
        if value is None:
            assert key not in unused
        elif key not in row and key not in unused:  # so it changed what is learned, or says nothing
            assert value in ("", []) or key == "weight" or conversation != read(row)[0]


@given(st.sampled_from(["id", "weight", "train", "cache_control", "end_turn", "name"]), st.sampled_from([0, 1, "x"]))
def test_a_further_key_of_a_turn_is_used_or_reported_or_the_row_is(key: str, value: Any) -> None:
    row = {"messages": [ASKED, ANSWERED, ASKED, ANSWERED | {key: value}]}
    try:
        conversation, unused = read(row)
    except UnusableRowError:
        return
    plain, _ = read({"messages": [ASKED, ANSWERED, ASKED, ANSWERED]})
    says_nothing = key in ("weight", "train") and value == 1
    assert (unused == [f"messages[].{key}"]) + (conversation != plain) + says_nothing == 1


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"input": "1 + 1?", "target": "2", "id": 7, "lang": None}, ["id"]),
        ({"messages": [ASKED, ANSWERED], "prompt": "1 + 1?", "source": "x"}, ["prompt", "source"]),
        ({"instruction": "1 + 1?", "output": "2", "text": "### ..."}, ["text"]),
        ({"messages": [{"role": "system", "content": "T"}, ASKED, ANSWERED], "system": "S"}, ["system"]),
        ({"messages": [ASKED, ANSWERED], "system": "S", "system_prompt": "T"}, ["system_prompt"]),
        (
            {"question": "q", "answers": {"text": ["2", "two"], "answer_start": [0, 0]}},
            ["answers.answer_start", "answers.text[1:]"],
        ),
        ({"messages": [ASKED | {"id": 1}, ANSWERED | {"id": 2}]}, ["messages[].id"]),
        ({"messages": [ASKED | {"weight": 1}, ANSWERED]}, ["messages[].weight"]),
        (answering(reasoning_content="a", thinking="b"), ["messages[].thinking"]),
        (
            answering(content=[{"type": "text", "text": "2", "cache_control": "x"}]),
            ["messages[].content[].cache_control"],
        ),
        (
            answering(tool_calls=[{"index": 0, "function": CALL | {"x": 1}}]),
            ["messages[].tool_calls[].function.x", "messages[].tool_calls[].index"],
        ),
        (answering(tool_calls=CALLED, function_call=CALL), ["messages[].function_call"]),
    ],
)
def test_what_is_not_used_is_named(row: dict[str, Any], unused: list[str]) -> None:
    assert sorted(read(row)[1]) == unused


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_every_name_that_templates_know_it_by(key: str) -> None:
    conversation, unused = read(answering(**{key: "one and one"}))
    assert unused == []
    assert conversation.turns[1].extras == {"reasoning_content": "one and one"}
    assert conversation.turns[1].message() == ANSWERED | dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"), "one and one"
    )
    assert conversation.turns[0].message() == ASKED


@pytest.mark.parametrize(
    "calls",
    [
        CALLED,
        [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
        [{"type": None, "function": {"name": "add", "arguments": {"a": 1, "b": None}}}],
        [CALL],
        [{"name": "add", "parameters": {"a": 1}}],
        json.dumps(CALLED),
        CALL,
    ],
)
def test_calls_of_tools_have_the_form_that_templates_expect(calls: Any) -> None:
    conversation, unused = read(answering(tool_calls=calls))
    assert (conversation.turns[1].extras, unused) == ({"tool_calls": CALLED}, [])


def test_the_id_of_a_call_is_kept_and_a_call_may_have_no_arguments() -> None:
    conversation, _ = read(answering(tool_calls=[{"id": "x", "function": {"name": "now", "arguments": ""}}]))
    function = {"name": "now", "arguments": {}}
    assert conversation.turns[1].extras["tool_calls"] == [{"type": "function", "id": "x", "function": function}]


@pytest.mark.parametrize("tools", [FUNCTION, [ADD], ADD, json.dumps([ADD]), [json.dumps(FUNCTION[0])]])
def test_tools_have_the_form_that_templates_expect(tools: Any) -> None:
    for name in ("tools", "functions"):
        conversation, unused = read({"messages": [ASKED, ANSWERED], name: tools})
        assert (conversation, unused) == (Conversation([USER, ANSWER], FUNCTION), [])


@pytest.mark.parametrize("tools", [[], "", "[]", None])
def test_no_tools_are_none(tools: Any) -> None:
    assert read({"messages": [ASKED, ANSWERED], "tools": tools})[0].tools is None


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("off", [0, 0.0, False])
def test_an_answer_may_carry_no_loss(key: str, off: Any) -> None:
    conversation, unused = read({"messages": [ASKED, ANSWERED | {key: off}, ASKED, ANSWERED | {key: not off}]})
    assert [turn.supervised for turn in conversation.turns if turn.role == "assistant"] == [False, True]
    assert unused == []


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (answering(weight=-0.5), "turn 2 of 'messages': its weight is -0.5: a weight is a number of at least 0"),
        (answering(train="no"), "turn 2 of 'messages': its train is a string: weights other than 0 and 1 are"),
        (answering(weight=0), "no turn of the assistant carries loss, by the weights of its turns"),
        (answering() | {"weight": 0}, "its weight is 0"),
        (answering() | {"weight": 2}, "its weight is 2: weights other than 0 and 1 are not supported"),
        (answering(content=""), "turn 2, an answer, is empty"),
        (answering(content=None), "turn 2 of 'messages': field 'content' is null, not text"),
        (answering(content=None, tool_calls=[]), "turn 2, an answer, is empty"),
        (
            answering(content=[{"type": "image_url", "image_url": "x"}]),
            "turn 2 of 'messages': field 'content' has a part of type 'image_url'",
        ),
        (answering(content=[{"type": "text"}]), "turn 2 of 'messages': field 'content[]' is null, not text"),
        (answering(reasoning_content=1), "turn 2 of 'messages': field 'reasoning_content' is a number, not text"),
        (answering(reasoning_content="\ud800"), "turn 2 of 'messages': field 'reasoning_content' has half a surrogate"),
        (
            answering(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
            "turn 2 of 'messages': field 'arguments' is no JSON: ",
        ),
        (
            answering(tool_calls=[{"function": {"name": "f", "arguments": "1"}}]),
            "turn 2 of 'messages': field 'arguments' is a number, not an object",
        ),
        (
            answering(tool_calls=[{"function": {"name": "f", "arguments": {"a": ["\udc00"]}}}]),
            "turn 2 of 'messages': field 'arguments' has half a surrogate pair",
        ),
        (
            answering(tool_calls=[{"function": {"name": "f", "arguments": {"a": {"\udc00": 1}}}}]),
            "turn 2 of 'messages': field 'arguments' has half a surrogate pair",
        ),
        (answering(tool_calls=[{}]), "turn 2 of 'messages': field 'tool_calls[].name' is null, not text"),
        (answering() | {"tools": "add"}, "field 'tools' is no JSON: "),
        (answering() | {"tools": [1]}, "field 'tools[]' is a number, not an object"),
        (answering() | {"system": 1}, "field 'system' is a number, not text"),
        ({"messages": [{"role": "judge", "content": "a"}]}, "turn 1 of 'messages' has the role 'judge'; the"),
        ({"conversations": [{"from": "function_call", "value": "add"}]}, "turn 1 of 'conversations': field 'value'"),
        ({"input": "a", "target": "b", "history": "c"}, "field 'history' is no list of pairs"),
        ({"input": "a", "target": "b", "history": [["c"]]}, "field 'history' is no list of pairs"),
        ({"input": "a", "target": "b", "history": [["c", ""]]}, "turn 2, an answer, is empty"),
        ({"input": "a", "target": ""}, "field 'target' is empty"),
        ({"input": "a", "target": None}, "field 'target' is null, not text"),
        ({"question": "a", "answers": []}, "field 'answers' is empty"),
        ({"prompt": [ASKED], "completion": [ASKED]}, "no turn of the assistant, so nothing to learn from"),
        ({"messages": None, "input": "a", "output": None, "target": None}, "no field 'target' (nor "),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnusableRowError) as caught:
        read(row)
    assert str(caught.value).startswith(problem)


def test_calls_that_are_nested_too_deeply_are_a_bad_row() -> None:
    deep: Any = 1
    for _ in range(2000):
        deep = {"a": deep}
    with pytest.raises(UnusableRowError, match="'arguments' is nested too deeply"):
        read(answering(tool_calls=[{"name": "f", "arguments": deep}]))


def test_named_fields_may_be_text_or_messages_and_the_others_are_reported() -> None:
    row = {"q": "1 + 1?", "a": [ANSWERED], "system": "S", "input": "x", "messages": [ASKED]}
    assert read(row, "q", "a") == (Conversation(told("S")), ["input", "messages"])


def test_rows_of_a_parquet_file_are_those_of_json(tmp_path: Path) -> None:
    """Parquet gives each row, turn, call and schema the keys of all of them."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        answering(tool_calls=CALLED) | {"tools": [ADD]},
        answering(tool_calls=[{"id": "x", "function": {"name": "now", "arguments": {"zone": "UTC"}}}]),
        answering(weight=1, reasoning_content="one and one"),
        {"instruction": "1 + 1?", "output": "2", "history": [["a", "b"]]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows, _schema(pyarrow, rows)), tmp_path / "rows.parquet")
    read_back = list(ParquetReader(NoOptions(), ReaderContext()).read(tmp_path / "rows.parquet"))
    assert [read(dict(row.fields)) for row in read_back if isinstance(row, Row)] == [read(row) for row in rows]


def _schema(pyarrow: Any, rows: list[dict[str, Any]]) -> Any:
    return pyarrow.unify_schemas(
        [pyarrow.Table.from_pylist([row]).schema for row in rows], promote_options="permissive"
    )
