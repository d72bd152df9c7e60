"""Text to token ids. Over the zoo: test_one_text.py compares what tasks make of it with plain transformers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from tokenizer_zoo import CONTROL
from tokenizer_zoo import TOKENIZERS
from tokenizer_zoo import load

from panda.data.conversations import UnusableRowError
from panda.data.encoding import Encoder

IN_PYTHON = {"byt5"}
FAST = [name for name in TOKENIZERS if name not in IN_PYTHON]
texts = st.lists(st.sampled_from(["a", " ", "heron", "\n", "é", "12", "<", *CONTROL, "</s>"]), max_size=8).map("".join)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen", "llama2-prepend", "gemma", "eos-zero", "holes"])
@settings(max_examples=30)
@given(text=texts)
def test_content_is_encoded_as_tokenizers_encodes_characters(name: str, text: str) -> None:
    encoder = Encoder(load(name))
    got = encoder.encode([encoder.as_characters(text)])
    backend = load(name).backend_tokenizer
    backend.encode_special_tokens = True
    assert got == [backend.encode(text, add_special_tokens=False).ids]


@pytest.mark.parametrize("name", FAST)
def test_spelt_tokens_are_characters_among_tokens_that_are_not(name: str) -> None:
    encoder = Encoder(load(name))
    one, other = CONTROL[:2]
    content = encoder.as_characters({"text": [f"a{other}b", 7, None]})["text"]
    assert content[1:] == [7, None]
    [ids] = encoder.encode([f"{one}{content[0]}{one}"])
    special = encoder.tokenizer.convert_tokens_to_ids([one, other])
    assert [token for token in ids if token in special] == [special[0]] * 2
    assert encoder.readable(content[0]) == f"a{other}b"


@pytest.mark.parametrize("name", FAST)
def test_marks_in_content_are_characters_too(name: str) -> None:
    encoder = Encoder(load(name))
    forged = encoder.as_characters("\ufdd02\ufdd1")
    assert encoder.readable(forged) == "\ufdd02\ufdd1"
    [ids] = encoder.encode([forged])
    assert not set(ids) & (set(encoder.special.values()) - {encoder.tokenizer.unk_token_id})


def test_a_tokenizer_in_python_refuses_what_it_cannot_write() -> None:
    encoder = Encoder(load("byt5"))
    assert encoder.as_characters("a heron") == "a heron"
    with pytest.raises(UnusableRowError, match="it spells the special token '</s>', which this tokenizer cannot"):
        encoder.as_characters("a </s>")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_without_marks_is_encoded_as_transformers_does(name: str) -> None:
    tokenizer = load(name)
    if name not in IN_PYTHON:
        tokenizer.backend_tokenizer.enable_padding(length=50)
        tokenizer.backend_tokenizer.enable_truncation(5)
    written = [f"{CONTROL[0]}user\nWhere is it?{CONTROL[1]}\n", "a longer text, with 12 words", ""]
    expected = load(name)(written, add_special_tokens=False)["input_ids"]
    assert Encoder(tokenizer).encode(written) == expected


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_begins_as_the_tokenizer_begins_it(name: str) -> None:
    tokenizer = load(name)
    encoder = Encoder(tokenizer)
    whole = tokenizer("The heron waits.")["input_ids"]
    made = [*encoder.begin, *encoder.encode(["The heron waits."])[0]]
    assert made == whole[: len(made)]
    assert len(whole) - len(made) <= 1, "only an end token comes after it"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"{CONTROL[0]}user\n", "\n12 "),
        ("Say: ", "heron"),
        ("Say:\n", "\nheron"),
        ("Say:\n", "  heron"),
        ("1", "2 herons"),
        ("a", "b c"),
    ],
)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_continuation_decodes_to_its_text_after_the_prompt(name: str, before: str, after: str) -> None:
    encoder = Encoder(load(name))
    ids = encoder.continuation(before, after)
    if name == "word-level" and not before[-1].isspace():
        return  # its words are whole: it writes none in the middle of one
    [prompt], [whole] = encoder.encode([before, before + after][:1]), encoder.encode([before + after])
    assert encoder.decode([*prompt, *ids]) == encoder.decode(whole)


class Echo:
    """A tokenizer of one token, which decodes to nothing that it was made of."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos
        self.added_tokens_decoder: dict[int, Any] = {}
        self.all_special_tokens: list[str] = []
        self.all_special_ids: list[int] = []

    def __call__(self, texts: list[str], **options: Any) -> Any:
        return {"input_ids": [[len(text)] for text in texts]}

    def decode(self, ids: list[int], **options: Any) -> str:
        return "x" * len(ids)


def test_text_that_tokens_do_not_give_back_is_counted() -> None:
    encoder = Encoder(load("unigram"))
    texts = ["The heron", "The \u4e9c", " The  heron\n"]
    assert encoder.altered(texts, encoder.encode(texts)) == 1
    assert Encoder(Echo()).altered(["ab"], [[2]]) == 1


@pytest.mark.parametrize("name", [*FAST, "byt5"])
def test_what_a_normaliser_or_a_decoder_does_is_no_loss(name: str) -> None:
    encoder = Encoder(load(name))
    texts = [
        f"{CONTROL[0]}The heron waits in the reeds,  and\n\nthe pike below it.{CONTROL[1]}\n",
        "THE HERON" if name != "unigram" else "the",
    ]
    assert encoder.altered(texts, encoder.encode(texts)) == (1 if name == "word-level" else 0)


def test_a_special_token_that_is_ordinary_text_too_stays_in_content() -> None:
    tokenizer = load("gpt2")
    for pad in ("!", "he"):
        tokenizer.add_special_tokens({"pad_token": pad})
        encoder = Encoder(tokenizer)
        [ids] = encoder.encode([encoder.as_characters("The heron! <|im_end|>")])
        assert encoder.decode(ids) == "The heron! <|im_end|>"
        [marked] = encoder.encode([f"{pad}{encoder.as_characters(pad)}{CONTROL[0]}"])
        assert marked[0] == tokenizer.pad_token_id and marked[-1] == tokenizer.convert_tokens_to_ids(CONTROL[0])


@pytest.mark.parametrize(("length", "kept"), [(0, [1]), (1, [1]), (2, [1, 5]), (3, [1, 4, 5]), (9, [1, 3, 4, 5])])
def test_what_is_cut_keeps_its_begin_token(length: int, kept: list[int]) -> None:
    assert Encoder(Echo(bos=1)).cut([1, 3, 4, 5], length) == kept
    assert Encoder(Echo()).cut([1, 3, 4, 5], length) == [1, 3, 4, 5][4 - min(length, 4) :]
