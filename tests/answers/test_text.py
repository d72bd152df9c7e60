"""The pieces of an answer, put together, are its text, for tokenizers of each kind."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerFast

from panda.answers.text import Pieces
from panda.answers.text import decoded
from panda.registry.location import resolve_path

WORDS = ["The", "heron", "waits", ".", ",", "'", "s", "n't", "é", "竹", "  "]


def byte_level() -> Any:
    return AutoTokenizer.from_pretrained(resolve_path("panda:data/sample/tokenizer"))


def byte_fallback() -> Any:
    """As LLaMA's: words with a sign for the space before them, and bytes as tokens of their own."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *WORDS]
    vocabulary = dict.fromkeys([*pieces, *(f"▁{word}" for word in WORDS)])
    model = models.BPE({piece: number for number, piece in enumerate(vocabulary)}, [], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece() -> Any:
    """As BERT's, which cleans spaces up when it decodes, unless told not to."""
    pieces = dict.fromkeys(["[UNK]", "[SEP]", *WORDS, *(f"##{word}" for word in WORDS)])
    tokenizer = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]", clean_up_tokenization_spaces=True
    )


TOKENIZERS = {make.__name__: make() for make in (byte_level, byte_fallback, word_piece)}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_pieces_are_the_text(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    if kind != "word_piece":  # runs of real characters, which random bytes seldom are
        text = data.draw(st.text(max_size=8))
        encoded = [3 + byte for byte in text.encode()] if kind == "byte_fallback" else tokenizer(text)["input_ids"]
        ids = [*ids, *encoded, *ids[:3]]
    pieces = Pieces(tokenizer)
    given_out = [pieces.add(token) for token in ids]
    whole = decoded(tokenizer, ids)
    assert "".join(given_out) + pieces.rest() == whole
    plain = tokenizer.decode(ids, skip_special_tokens=True)
    assert whole == plain or tokenizer.clean_up_tokenization_spaces


def test_text_without_spaces_is_not_held_back_but_for_incomplete_characters() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    pieces = Pieces(tokenizer)
    given_out = [pieces.add(token) for token in tokenizer("竹子é", add_special_tokens=False)["input_ids"]]
    assert given_out == ["", "", "竹", "", "", "子", "", "é"]
    pieces = Pieces(TOKENIZERS["byte_fallback"])
    words = TOKENIZERS["byte_fallback"].convert_tokens_to_ids(["▁heron", "waits", "竹"])
    assert [pieces.add(token) for token in words] == ["heron", "waits", "竹"]
