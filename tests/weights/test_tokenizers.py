"""Ids of a tokenizer with holes between them: its number of entries says nothing about its highest id."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import llama
from tokenizers import Tokenizer
from tokenizers import models
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.registry import UserError
from panda.run.preparation import Preparation
from panda.weights.tokenizers import read_tokenizer
from panda.weights.tokenizers import rows_needed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer with four entries, one of them with id 70,000, beside weights with 70,001 rows."""
    vocabulary = {"<eos>": 0, "a": 1, "b": 2, "far": 70_000}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert len(tokenizer) == 4
    model = llama(vocab_size=70_001, hidden_size=8, num_attention_heads=2, num_key_value_heads=1)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "a far b"}]))
    return tmp_path


def prepared(folder: Path, *more: str) -> Preparation:
    data = ("--task", "pretrain", "--pretraining_data_dir", str(folder / "rows.json"))
    flags = ["--model", "llama", "--ckpt_path", str(folder / "base"), "--max_seq_length", "8", *data, *more]
    return Preparation(configure(parse_arguments(flags)))


def test_ids_above_65535_are_kept_whole(folder: Path) -> None:
    preparation = prepared(folder)
    assert rows_needed(preparation.tokenizer) == 70_001
    assert preparation.dataset[0]["token_ids"].tolist() == [1, 70_000, 2, 0]


def test_rows_have_to_reach_the_highest_id(folder: Path) -> None:
    config: dict[str, Any] = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps(config | {"vocab_size": 60_000}))
    with pytest.raises(UserError, match=r"it needs 70,001 rows \(its highest id is 70,000\), and .* has 60,000"):
        _ = prepared(folder).context
    grown = prepared(folder, "--extend_vocab").context.config
    assert grown is not None and grown["vocab_size"] == 70_001


@pytest.mark.parametrize("installed", [False, True])
def test_transformers_says_nothing_of_a_missing_package_before_panda_does(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("panda.weights.tokenizers._is_installed", lambda module: installed)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    told: list[logging.LogRecord] = []
    logger = logging.getLogger("transformers.tokenization_utils_tokenizers")
    monkeypatch.setattr(logger, "callHandlers", told.append)
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        read_tokenizer(tmp_path)
    assert len(told) == installed, "where the package is there, only transformers says why it failed"
    logger.warning("x. Falling back to TikToken extractor.")
    assert len(told) == installed + 1, "it is only silent around this load"


@pytest.mark.parametrize(
    ("content", "absent", "said"),
    [
        (b"\n\x0e\n\x05<unk>", ("sentencepiece",), r"a model of SentencePiece .*, which sentencepiece would read"),
        (b"\n\x0e\n\x05<unk>", ("sentencepiece", "google.protobuf"), r"which sentencepiece and protobuf would read"),
        (b"IQ== 0\nIg== 1\n", ("tiktoken",), r"a model of tiktoken .*, which tiktoken would read"),
    ],
)
def test_what_reads_a_model_without_tokenizer_json_is_named(
    content: bytes, absent: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')

    def fail(*_: object, **__: object) -> None:
        raise ValueError("`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`.")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    monkeypatch.setattr("panda.weights.tokenizers._is_installed", lambda module: module not in absent)
    with pytest.raises(UserError, match=said):
        read_tokenizer(tmp_path)


def test_a_folder_with_only_a_sentencepiece_model_is_read_as_sentencepiece_does(tmp_path: Path) -> None:
    sentencepiece: Any = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["The heron waits in the reeds, and the otter sleeps."] * 9),
        model_writer=written,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": false}')
    plain = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    text = "The otter waits, ø too."
    assert read_tokenizer(tmp_path)(text, add_special_tokens=False)["input_ids"] == plain.encode(text)


def test_a_panic_of_tokenizers_is_an_error_in_words(folder: Path) -> None:
    """Its Rust code looks up a special token of a template that is not there."""
    file = folder / "base/tokenizer.json"
    pieces = [{"SpecialToken": {"id": "<gone>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": {}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": template}))
    with pytest.raises(UserError, match=r"base: no tokenizer could be loaded from it: ."):
        read_tokenizer(folder / "base")


@pytest.mark.parametrize(("file", "content"), [("spiece.model", b"\n\x05"), ("vocab.json", b'{"a": 0, "b": 1}')])
def test_a_folder_in_which_its_class_finds_no_vocabulary_is_an_error(tmp_path: Path, file: str, content: bytes) -> None:
    """transformers makes a tokenizer of it that reads every text as `<unk>`."""
    (tmp_path / file).write_bytes(content)
    values = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"LlamaTokenizer, .* finds no vocabulary in its files \({file}\)"):
        read_tokenizer(tmp_path)
