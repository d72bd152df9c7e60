"""Ids of a tokenizer with holes between them: its number of entries says nothing about its highest id."""

from __future__ import annotations

import json
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
    ids, _ = preparation.dataset[0]
    assert ids.tolist() == [1, 70_000, 2, 0]


def test_rows_have_to_reach_the_highest_id(folder: Path) -> None:
    config: dict[str, Any] = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps(config | {"vocab_size": 60_000}))
    with pytest.raises(UserError, match=r"it needs 70,001 rows \(its highest id is 70,000\), and .* has 60,000"):
        _ = prepared(folder).context
    grown = prepared(folder, "--extend_vocab").context.config
    assert grown is not None and grown["vocab_size"] == 70_001
