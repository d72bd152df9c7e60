"""The pretrain task: documents, joined, split and predicted to the last token."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import decoders
from tokenizers import processors

from panda.registry import UserError

BOS, EOS = 1, 2


def ids(text: str) -> list[int]:
    """What the embedded tokenizer makes of text, by its definition."""
    return [byte + 3 for byte in text.encode()]


def samples(task: Any) -> list[tuple[list[int], list[bool]]]:
    dataset = task.dataset()
    return [
        (dataset[index]["token_ids"].tolist(), dataset[index]["supervised"].tolist()) for index in range(len(dataset))
    ]


def begins_with_bos(tokenizer: Any, does: bool) -> None:
    """Make ``tokenizer`` write <s> before each text, or nothing."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A" if does else "$A", special_tokens=[("<s>", BOS)]
    )


def test_title_and_content_are_one_text_that_carries_loss(pretrain: Any) -> None:
    [(tokens, supervised)] = samples(pretrain([{"title": "Pandas", "content": "Pandas eat.\nBamboo."}]))
    assert tokens == [BOS, *ids("Pandas\nPandas eat.\nBamboo."), EOS]
    assert supervised == [False] + [True] * (len(tokens) - 1)


def test_a_document_that_just_fits_is_one_sample_and_a_longer_one_two(pretrain: Any) -> None:
    row = {"title": "ab", "content": "cd"}  # 7 tokens
    assert len(samples(pretrain([row], max_seq_length=7))) == 1
    assert [tokens for tokens, _ in samples(pretrain([row], max_seq_length=6))] == [
        [BOS, *ids("ab\ncd")],
        [*ids("d"), EOS],
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.text(max_size=9), st.text(min_size=1, max_size=30)), min_size=1, max_size=4),
    st.integers(2, 25),
    st.booleans(),
)
def test_every_token_but_the_first_of_a_document_is_predicted_exactly_once(
    pretrain: Any, tokenizer: Any, documents: list[tuple[str, str]], limit: int, has_bos: bool
) -> None:
    begins_with_bos(tokenizer, has_bos)
    task = pretrain([{"title": title, "content": content} for title, content in documents], max_seq_length=limit)
    predicted = []
    for tokens, supervised in samples(task):
        assert 2 <= len(tokens) <= limit
        assert supervised == [False] + [True] * (len(tokens) - 1)
        predicted += [(tokens[place - 1], tokens[place]) for place in range(1, len(tokens))]
    expected = []
    for title, content in documents:
        whole = [*[BOS] * has_bos, *ids(f"{title}\n{content}"), EOS]
        expected += pairwise(whole)
    assert predicted == expected
    assert task.dataset().report.truncated == 0


def test_a_tokenizer_without_an_end_token_is_refused(pretrain: Any, tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"tokenizer: .*no end-of-sequence token"):
        pretrain([{"title": "a", "content": "b"}])


def test_a_document_needs_a_title_or_content(pretrain: Any) -> None:
    task = pretrain([{"title": "", "content": "b"}, {"title": "a", "content": ""}, {"title": "", "content": ""}])
    assert len(task.dataset()) == 2
    [bad] = task.dataset().report.first_bad_rows
    assert str(bad).endswith("rows.json, row 3: fields 'title' and 'content' are empty")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "only text"}, "only text"),
        ({"content": "no title"}, "no title"),
        ({"title": "t", "text": "x"}, "t\nx"),
        ({"title": "t", "content": "c", "text": "not this"}, "t\nc"),
    ],
)
def test_common_fields_are_recognised(pretrain: Any, row: Any, text: str) -> None:
    [(tokens, _)] = samples(pretrain([row]))
    assert tokens == [BOS, *ids(text), EOS]


def test_fields_can_be_named(pretrain: Any) -> None:
    row = {"head": "h", "body": "b", "text": "not this"}
    [(tokens, _)] = samples(pretrain([row], title_field="head", content_field="body"))
    assert tokens == [BOS, *ids("h\nb"), EOS]


def test_a_row_without_text_says_what_it_has(pretrain: Any) -> None:
    [bad] = pretrain([{"body": "b"}, {"text": "x"}]).dataset().report.first_bad_rows
    assert bad.problem == "no field 'content' and no 'text' (content_field names another); its fields are: 'body'"


def test_the_prompt_of_generation_is_the_beginning_of_a_document(pretrain: Any) -> None:
    task = pretrain([{"title": "Pandas", "content": "They eat bamboo all day long, and then they sleep."}])
    [prompt] = task.example_prompts(2)
    assert prompt == "Pandas\nThey eat bamboo all day long, and"[:40]
    [(tokens, _)] = samples(task)
    encoded = task.encode_prompt(prompt)
    assert encoded == tokens[: len(encoded)] == [BOS, *ids(prompt)]


def test_an_empty_prompt_is_the_start_of_a_document(pretrain: Any, tokenizer: Any) -> None:
    task = pretrain([{"title": "a", "content": "b"}])
    assert task.encode_prompt("") == [BOS]
    begins_with_bos(tokenizer, False)
    assert pretrain([{"title": "a", "content": "b"}]).encode_prompt("") == [EOS]


def test_the_export_of_a_chat_model_writes_no_dialogue(pretrain: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    task = pretrain([{"text": "a <user>"}])
    assert task.tokenizer.chat_template is None and tokenizer.chat_template
    [(tokens, _)] = samples(task)
    assert tokens == [BOS, *ids("a <user>"), EOS]


def test_documents_whose_tokens_do_not_give_their_text_back_are_counted(pretrain: Any, tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("é", "")])
    assert pretrain([{"text": "a"}, {"text": "é"}]).dataset().report.altered == 1


def test_a_prompt_that_cannot_be_written_is_one_line(pretrain: Any, tokenizer: Any) -> None:
    task = pretrain([{"text": "a"}])
    with pytest.raises(UserError, match=r"prompt '</s> PandaSpecialToken': it spells '</s>' and 'PandaSpecialToken'"):
        task.encode_prompt("</s> PandaSpecialToken")
    rows = pretrain([{"text": "</s> PandaSpecialToken"}, {"text": "a"}]).dataset().report
    assert rows.bad_rows == 1
