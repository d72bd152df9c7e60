"""The specimens are of the kinds that they stand for, with this version of transformers."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizer_zoo import CONTROL
from tokenizer_zoo import TEMPLATES
from tokenizer_zoo import TOKENIZERS
from tokenizer_zoo import load


def pieces(name: str, text: str, **options: Any) -> list[str]:
    tokenizer = load(name)
    return tokenizer.convert_ids_to_tokens(tokenizer(text, **options)["input_ids"])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_special_tokens_that_templates_write_are_tokens(name: str) -> None:
    tokenizer = load(name)
    for token in (*CONTROL, tokenizer.eos_token):
        ids = tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_tokens_to_ids(token) in ids, token


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_a_conversation(name: str) -> None:
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    if name == "wants-system":
        messages.insert(0, {"role": "system", "content": "Speak."})
    text = load("llama3", name).apply_chat_template(messages, tokenize=False)
    assert "Who?" in text and "Me." in text


def test_kinds_are_as_they_say() -> None:
    assert pieces("gpt2", "a") == ["a"]
    assert pieces("gpt2-prefix-space", "a") == ["Ġa"]
    assert pieces("llama3", "a") == ["<|begin_of_text|>", "a"]
    assert pieces("llama3", "123456") != pieces("qwen", "123456")
    assert pieces("smollm2", "1,024") == ["1", ",", "0", "2", "4"] != pieces("gpt2", "1,024")
    assert load("eos-zero").eos_token_id == 0
    assert pieces("nfkc", "ﬁ") == pieces("nfkc", "fi") != pieces("gpt2", "ﬁ")
    assert pieces("strips", "a <|im_end|>") == ["a", "<|im_end|>"]
    assert pieces("strips", "heron, herons").count("heron") == 1, "an added word is one where it stands apart"
    holes = load("holes")
    assert max(holes.get_vocab().values()) > len(holes)
    for name, after in [("llama2-prepend", "▁b"), ("llama2-metaspace", "b"), ("mistral", "▁b"), ("phi3", "▁b")]:
        assert pieces(name, "a</s>b") == ["<s>", "▁a", "</s>", after], name
    assert pieces("phi3", "<|end|>\n b") == ["<s>", "<|end|>", "▁b"]
    assert pieces("gemma", "a") == ["<bos>", "a"]
    assert pieces("llama2-prepend", "☃")[2:] == ["<0xE2>", "<0x98>", "<0x83>"]
    assert pieces("unigram", "a  a☃") == pieces("unigram", "a a☃")
    assert pieces("unigram", "☃") == ["▁", "<unk>", "</s>"]
    assert pieces("wordpiece", "HERON ☃") == ["[CLS]", "heron", "[UNK]", "[SEP]"]
    assert pieces("word-level", "The  snow") == ["The", "<unk>"]
    assert not load("byt5").is_fast
    assert load("qwen").added_tokens_decoder[load("qwen").convert_tokens_to_ids("<think>")].special is False
