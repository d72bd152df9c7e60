"""Chat templates: what they write, where answers end, what they use, and which day they know."""

from __future__ import annotations

from datetime import date
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from tokenizer_zoo import TEMPLATES
from tokenizer_zoo import TOKENIZERS
from tokenizer_zoo import load
from transformers.utils import chat_template_utils

from panda.data.conversations import Conversation
from panda.data.conversations import Turn
from panda.data.conversations import UnusableRowError
from panda.data.templates import ChatTemplate
from panda.data.templates import dated
from panda.data.templates import plain_template
from panda.data.templates import with_template
from panda.registry import UserError

DAY = date(2024, 2, 3)
ASKED = [Turn("user", "Where?")]
TOOL = {"type": "function", "function": {"name": "look", "description": "looks", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "reeds"}}}


def written(template: ChatTemplate, *turns: Turn, tools: Any = None) -> list[tuple[str, str]]:
    exchanges, _ = template.exchanges(Conversation([*turns], tools))
    return [(each.before, each.answer) for each in exchanges]


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=6))
def test_the_plain_template_writes_any_separator(separator: str) -> None:
    tokenizer = with_template(load("mistral"), plain_template(separator))
    template = ChatTemplate(tokenizer)
    turns = [Turn("system", "S"), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")]
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    first = f"{begin}S{separator}a{separator}"
    assert written(template, *turns) == [(first, f"b{end}"), (f"{first}b{end}c{separator}", f"d{end}")]


def test_a_separator_that_no_json_in_ascii_could_hold_is_whole_in_the_template() -> None:
    assert " 🐼 " in plain_template(" 🐼 ")
    plain_template(" 🐼 ").encode()


@pytest.mark.parametrize("written_at_the_front", ["", "  \n x", "{# a note #}\n"])
def test_a_template_is_dated_for_good(monkeypatch: Any, written_at_the_front: str) -> None:
    source = written_at_the_front + TEMPLATES["llama3.2"]
    tokenizer = with_template(load("llama3"), source)

    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(DAY.year, DAY.month, DAY.day, tzinfo=tz)

    with monkeypatch.context() as patched:
        patched.setattr(chat_template_utils, "datetime", Then)
        messages = [{"role": "user", "content": "Where?"}]
        expected = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "03 Feb 2024" in expected
    fixed = dated(source, DAY)
    assert with_template(tokenizer, fixed).apply_chat_template(messages, tokenize=False) == expected
    assert dated(fixed, date(2025, 1, 1)) == fixed, "the date that an export carries stays"
    assert dated({"default": source, "other": "x"}, DAY) == {"default": fixed, "other": "x"}


ANSWERS = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


def test_the_format_of_a_date_is_found_beside_other_strings() -> None:
    """As in Granite's template, where a block begins with a dash."""
    source = (
        "{%- if messages[0]['role'] == 'system' %}{%- set s = 'a % b' %}\n{%- else %}\n"
        "{%- set s = \"Today's Date: \" + strftime_now('%B %d, %Y') + '.' %}{%- endif %}{{ s }}" + ANSWERS
    )
    tokenizer = with_template(load("qwen"), dated(source, DAY))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text == "Today's Date: February 03, 2024.a<|im_end|>"


def test_a_format_that_is_put_together_is_refused() -> None:
    tokenizer = with_template(load("qwen"), dated("{{ strftime_now('%d' ~ ' %B') }}" + ANSWERS, DAY))
    with pytest.raises(UserError, match="a format of the date that is not one string: %d %B"):
        _ = ChatTemplate(tokenizer).end_tokens


@pytest.mark.parametrize("template", [None, "no date {{ messages }}"])
def test_a_template_without_a_date_stays_as_it_is(template: str | None) -> None:
    assert dated(template, DAY) == template


def test_an_answer_ends_at_the_first_token_that_the_template_writes_after_it() -> None:
    template = ChatTemplate(load("phi3", "phi3"))
    assert template.end_tokens == [template.encoder.special["<|end|>"]]
    assert written(template, *ASKED, Turn("assistant", "Here.")) == [
        ("<|user|>\nWhere?<|end|>\n<|assistant|>\n", "Here.<|end|>")
    ]


def test_an_answer_that_calls_a_tool_may_have_an_end_of_its_own() -> None:
    end = "((message.tool_calls | string) + '<|eot_id|>' if message.tool_calls else '<|im_end|>')"
    source = TEMPLATES["chatml"].replace("'<|im_end|>'", end)
    template = ChatTemplate(with_template(load("qwen"), source))
    assert template.end_tokens == [template.encoder.special[end] for end in ("<|im_end|>", "<|eot_id|>")]


def test_a_template_that_opens_a_thought_is_continued_with_it() -> None:
    template = ChatTemplate(load("qwen", "deepseek-r1"))
    end = template.tokenizer.eos_token
    [(before, answer)] = written(template, *ASKED, Turn("assistant", "<think>\nReeds.\n</think>\n\nHere."))
    assert before.endswith("<think>\n") and answer == f"Reeds.\n</think>\n\nHere.{end}"
    assert written(template, *ASKED, Turn("assistant", "<think>Reeds.</think>Here.")) == [
        (before, f"Reeds.</think>Here.{end}")
    ]
    reasoned = Turn("assistant", "Here.", extras={"reasoning_content": "Reeds."})
    assert written(template, *ASKED, reasoned) == [(before, f"Reeds.\n</think>\n\nHere.{end}")]
    assert template.exchanges(Conversation([*ASKED, reasoned]))[1] == []
    with pytest.raises(UnusableRowError, match=r"begins an answer with '<think>\\n', and turn 2 does not"):
        written(template, *ASKED, Turn("assistant", "Here."))


def test_unsupervised_answers_are_only_in_what_comes_before() -> None:
    template = ChatTemplate(load("qwen", "chatml"))
    turns = [*ASKED, Turn("assistant", "No.", supervised=False), *ASKED, Turn("assistant", "Here.")]
    [(before, answer)] = written(template, *turns)
    assert answer == "Here.<|im_end|>" and "No.<|im_end|>" in before


def test_the_fields_and_tools_that_a_template_does_not_use_are_named() -> None:
    calls = Turn("assistant", "I look.", extras={"tool_calls": [CALL]})
    answer = Turn("assistant", "Here.", extras={"reasoning_content": "Reeds.", "name": "heron"})
    conversation = Conversation([*ASKED, calls, Turn("tool", "a heron"), answer], [TOOL])
    expected = {
        "chatml": ["messages[].name", "messages[].reasoning_content", "messages[].tool_calls", "tools"],
        "qwen3": ["messages[].name", "messages[].tool_calls", "tools"],
        "hermes": ["messages[].name", "messages[].reasoning_content"],
    }
    for name, unused in expected.items():
        assert ChatTemplate(load("qwen", name)).exchanges(conversation)[1] == unused


def test_content_that_a_template_leaves_out_is_named_by_its_role() -> None:
    source = TEMPLATES["chatml"].replace(
        "{% for message in messages -%}", "{% for message in messages if message.role != 'system' -%}"
    )
    turns = [Turn("system", "Be brief."), *ASKED, Turn("assistant", "Here."), *ASKED, Turn("assistant", "There.")]
    template = ChatTemplate(with_template(load("qwen"), source))
    assert template.exchanges(Conversation(turns))[1] == ["messages[].content of system"]
    thought = Turn("assistant", "<think>\nReeds.\n</think>\n\nHere.")  # of which later prompts lack the first part
    assert ChatTemplate(load("qwen", "qwen3")).exchanges(Conversation([*turns[:2], thought, *turns[3:]]))[1] == []


def test_what_a_template_writes_after_the_end_of_an_answer_is_not_lost_in_silence() -> None:
    parts = "('thought' + '<|im_end|>' + m.content if m.role == 'assistant' else m.content) + '<|im_end|>'"
    source = "{% for m in messages %}{{ " + parts + " }}{% endfor %}"
    template = ChatTemplate(with_template(load("qwen"), source))
    with pytest.raises(UnusableRowError, match=r"writes more of turn 2 after its end: 'Here\.'"):
        written(template, *ASKED, Turn("assistant", "Here."))


def test_a_call_that_a_template_does_not_write_is_no_answer() -> None:
    turns = [*ASKED, Turn("assistant", "", extras={"tool_calls": [CALL]})]
    with pytest.raises(UnusableRowError, match="writes nothing of turn 2, which calls a tool"):
        written(ChatTemplate(load("qwen", "chatml")), *turns)
    assert written(ChatTemplate(load("qwen", "hermes")), *turns)


def test_an_answer_to_nothing_carries_no_loss() -> None:
    template = ChatTemplate(load("qwen", "chatml"))
    greeting = Turn("assistant", "Hello!")
    exchanges, unused = template.exchanges(Conversation([greeting, *ASKED, Turn("assistant", "Here.")]))
    assert [each.answer for each in exchanges] == ["Here.<|im_end|>"] and "Hello!<|im_end|>" in exchanges[0].before
    assert unused == ["messages[0], an answer to nothing, for loss"]
    with pytest.raises(UnusableRowError, match="nothing is before its only answer"):
        template.exchanges(Conversation([greeting]))


def test_an_end_may_be_an_added_token_that_is_not_special() -> None:
    tokenizer = load("qwen")
    tokenizer.add_tokens(["<fin>"])
    template = ChatTemplate(with_template(tokenizer, ANSWERS.replace("<|im_end|>", "<fin>")))
    assert template.end_tokens == [tokenizer.convert_tokens_to_ids("<fin>")]


def test_no_mark_is_in_a_message() -> None:
    tokenizer = load("qwen")
    source = "{% for m in messages %}{{ m.content }}{% if 'x' not in m.content %}<|im_end|>{% endif %}{% endfor %}"
    with pytest.raises(UnusableRowError, match=r"ends turn 2 with 'x <\|im_start\|>'"):
        written(ChatTemplate(with_template(tokenizer, source)), *ASKED, Turn("assistant", "x <|im_start|>"))


def test_a_template_that_wants_a_system_turn_is_used_where_there_is_one() -> None:
    template = ChatTemplate(load("qwen", "wants-system"))
    turns = [Turn("system", "S"), *ASKED, Turn("assistant", "Here.")]
    assert len(written(template, *turns)) == 1
    with pytest.raises(UnusableRowError, match="the chat template refuses it: The first message must be a system"):
        written(template, *turns[1:])


def test_a_template_that_refuses_every_conversation_is_refused() -> None:
    tokenizer = with_template(load("qwen"), "{{ raise_exception('never') }}")
    with pytest.raises(UserError, match=r"template: the chat template refuses it: never \(a question and an answer\)"):
        _ = ChatTemplate(tokenizer).end_tokens


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_are_encoded_in_parts_as_they_are_whole(name: str, template: str) -> None:
    made = ChatTemplate(load(name, template))
    content = (" a\n", "don't  ", "\n\n12 ", "é 日本")
    system = [Turn("system", "Be a heron. ")] if template == "wants-system" else []
    texts = []
    for text in content:
        for turns in ([Turn("user", text)], [Turn("user", text), Turn("assistant", text), Turn("user", text)]):
            texts.append(made.prompt([*system, *turns]))
    assert made.encode(texts) == made.encoder.encode(texts)
    assert made.encode(texts) == made.tokenizer(texts, add_special_tokens=False)["input_ids"]
