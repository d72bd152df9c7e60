"""A byte-level tokenizer whose ids can be written out by hand, and tasks over rows given in the test."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from panda.data.json_reader import JsonReader
from panda.registry import NoOptions
from panda.registry.contexts import ReaderContext
from panda.registry.contexts import TaskContext
from panda.registry.location import resolve_path
from panda.tasks.instruct import Instruct
from panda.tasks.instruct import InstructOptions
from panda.tasks.language_modelling import LanguageModelling
from panda.tasks.pretrain import Pretrain
from panda.tasks.pretrain import PretrainOptions

MakeTask = Callable[..., LanguageModelling]


@pytest.fixture(scope="session")
def embedded_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(resolve_path("panda:data/sample/tokenizer")), local_files_only=True)


@pytest.fixture
def tokenizer(embedded_tokenizer: Any) -> Any:
    """The embedded tokenizer: <pad> 0, <s> 1, </s> 2, byte b is b + 3. A copy, free to change."""
    return copy.deepcopy(embedded_tokenizer)


@pytest.fixture
def instruct(tmp_path: Path, tokenizer: Any) -> MakeTask:
    """``instruct(rows, max_seq_length=...)``: the task over rows, or over text that is the file's."""

    def make(rows: Any, max_seq_length: int = 100, **options: Any) -> LanguageModelling:
        location = str(_write(tmp_path, rows))
        return Instruct(
            InstructOptions(instruction_tuning_data_dir=location, **options), _context(tokenizer, max_seq_length)
        )

    return make


@pytest.fixture
def pretrain(tmp_path: Path, tokenizer: Any) -> MakeTask:
    """``pretrain(rows, max_seq_length=...)``: likewise."""

    def make(rows: Any, max_seq_length: int = 100, **options: Any) -> LanguageModelling:
        location = str(_write(tmp_path, rows))
        return Pretrain(PretrainOptions(pretraining_data_dir=location, **options), _context(tokenizer, max_seq_length))

    return make


def _write(folder: Path, rows: Any) -> Path:
    file = folder / "rows.json"
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return file


def _context(tokenizer: Any, max_seq_length: int) -> TaskContext:
    return TaskContext(tokenizer, JsonReader(NoOptions(), ReaderContext()), max_seq_length)
