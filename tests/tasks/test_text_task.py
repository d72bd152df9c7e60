"""What decides the tokens decides where they are cached: a text task names all of it."""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from panda.data.json_reader import JsonReader
from panda.data.text_reader import TextOptions
from panda.data.text_reader import TextReader
from panda.data.token_cache import TokenCache
from panda.registry import NoOptions
from panda.registry.contexts import ReaderContext
from panda.registry.contexts import TaskContext
from panda.tasks.instruct import Instruct
from panda.tasks.instruct import InstructOptions
from panda.tasks.pretrain import Pretrain
from panda.tasks.pretrain import PretrainOptions

ROW = {"input": "a", "target": "b", "text": "c"}
PLUGIN = """
from panda.data.json_reader import JsonReader
from panda.tasks.pretrain import Pretrain

class Task(Pretrain):
    pass

class Reader(JsonReader):
    pass
"""


@pytest.fixture
def cached(tmp_path: Path, tokenizer: Any) -> Callable[..., Path | None]:
    """``cached(max_seq_length=9)``: where the samples of a file are cached, by a task made with these arguments."""
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([ROW]))
    os.utime(file, (time.time() - 60, time.time() - 60))

    def make(
        task: Any = Pretrain,
        options: Any = None,
        tokenizer: Any = tokenizer,
        reader: Any = JsonReader,
        reader_options: Any = None,
        max_seq_length: int = 10,
    ) -> Path | None:
        reader_options = reader_options or NoOptions()
        read = reader(reader_options, ReaderContext())
        context = TaskContext(tokenizer, read, max_seq_length, reader_options, TokenCache(tmp_path / "cache"))
        made = task(options or PretrainOptions(pretraining_data_dir=str(file)), context)
        found: Path | None = made.dataset().directory
        return found

    return make


def test_the_same_is_found_again(cached: Any, tokenizer: Any) -> None:
    assert cached() == cached(tokenizer=copy.deepcopy(tokenizer)) is not None


def test_the_length_of_a_sample_decides(cached: Any) -> None:
    assert cached(max_seq_length=9) != cached()


def test_the_task_and_its_options_decide(cached: Any, tmp_path: Path) -> None:
    def instruct(**options: Any) -> Any:
        location = {"instruction_tuning_data_dir": str(tmp_path / "rows.json")}
        return cached(task=Instruct, options=InstructOptions(**location, **options))

    assert len({cached(), instruct(), instruct(separator=" ")}) == 3


def test_the_reader_and_its_options_decide(cached: Any) -> None:
    by_file, by_line = (cached(reader=TextReader, reader_options=TextOptions(each)) for each in ("file", "line"))
    assert len({cached(), by_file, by_line}) == 3


@pytest.mark.parametrize("part", ["task", "reader"])
def test_the_source_of_a_plugin_decides(
    cached: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """A class of panda's own is its name, and ``token_cache.VERSION``; of another package's, what is written there."""
    source = tmp_path / "of_a_plugin.py"
    monkeypatch.syspath_prepend(tmp_path)
    source.write_text(PLUGIN)
    plugin = importlib.import_module("of_a_plugin")
    try:
        arguments = {part: plugin.Task if part == "task" else plugin.Reader}
        before = cached(**arguments)
        assert cached(**arguments) == before != cached()
        source.write_text(PLUGIN + "# changed\n")
        assert cached(**arguments) != before
    finally:
        del sys.modules["of_a_plugin"]


def test_the_tokens_at_begin_and_end_decide(cached: Any, tokenizer: Any) -> None:
    """They are attributes of the tokenizer beside what its own file says."""
    ended, begun = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    ended.eos_token = "<pad>"
    begun.bos_token = "<pad>"
    assert ended.backend_tokenizer.to_str() == begun.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len({cached(), cached(tokenizer=ended), cached(tokenizer=begun)}) == 3


def test_the_vocabulary_decides(cached: Any, tokenizer: Any) -> None:
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["panda"])
    assert cached(tokenizer=larger) != cached()
