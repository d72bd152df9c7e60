"""What decides the tokens decides where they are cached: a text task names all of it."""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from panda.data.json_reader import JsonReader
from panda.data.order import Source
from panda.data.reading import Row
from panda.data.text_reader import TextOptions
from panda.data.text_reader import TextReader
from panda.data.token_cache import TokenCache
from panda.registry import NoOptions
from panda.registry import UserError
from panda.registry.contexts import ReaderContext
from panda.registry.contexts import TaskContext
from panda.registry.options import build
from panda.tasks.instruct import Instruct
from panda.tasks.instruct import InstructOptions
from panda.tasks.pretrain import Pretrain
from panda.tasks.pretrain import PretrainOptions

ROW = {"input": "a", "target": "b", "text": "c"}
PLUGIN = """
from panda.data.json_reader import JsonReader
from panda.data.reading import Row
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


class Upper(Pretrain):
    """As a plugin's task: it reads fields of its own."""

    def parse(self, row: Row) -> str:
        return str(row.fields["shout"]).upper() + row.fields.get("end", "")


def context_over(folder: Path, tokenizer: Any, rows: dict[str, list[dict[str, Any]]], **held_out: str) -> TaskContext:
    """The context of a task, with the files of ``rows`` in ``folder``."""
    for name, of_file in rows.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(of_file))
    return TaskContext(tokenizer, JsonReader(NoOptions(), ReaderContext()), 50, **held_out)  # type: ignore[arg-type]


@pytest.mark.parametrize("cache", [False, True])
def test_fields_that_a_task_does_not_read_are_counted(tmp_path: Path, tokenizer: Any, cache: bool) -> None:
    rows = [{"shout": "a", "id": 1, "title": None}, {"shout": "b", "end": "!", "id": 2, "text": "x"}, {"id": 3}]
    context = context_over(tmp_path, tokenizer, {"rows.json": rows[:2]})
    if cache:
        context = replace(context, token_cache=TokenCache(tmp_path / "cache"))
    task = Upper(PretrainOptions(pretraining_data_dir=str(tmp_path / "rows.json")), context)
    for _ in range(2):
        dataset = task.dataset()
        assert [tokenizer.decode(dataset[n]["token_ids"], skip_special_tokens=True) for n in (0, 1)] == ["A", "B!"]
        assert dataset.report.unused == {"id": 2, "text": 1}


def test_fields_of_documents_and_of_answers_are_counted_and_those_of_bad_rows_are_not(
    pretrain: Any, instruct: Any
) -> None:
    rows = [
        {"text": "a", "content": None, "title": None, "url": "x"},
        {"text": "a", "content": "b", "url": "y"},
        {"text": "a", "weight": 0, "url": "z"},
    ]
    report = pretrain(rows).dataset().report
    assert report.unused == {"url": 2, "text": 1}
    assert report.reasons == {"its weight is …": 1}
    answers = [{"input": "a", "target": "b", "id": 1}, {"input": "a", "target": "", "id": 1}]
    assert instruct(answers).dataset().report.unused == {"id": 1}


TRAINED, HELD = {"input": "a", "target": "b"}, {"input": "c", "target": "d"}


@pytest.mark.parametrize(
    "held_out", ["data/val", "data/val/held.json", "link", "link.json", "hard", "copy/../data/val"]
)
def test_files_that_are_held_out_are_not_trained_on_whatever_leads_to_them(
    tmp_path: Path, tokenizer: Any, held_out: str
) -> None:
    rows = {"data/rows.json": [TRAINED], "data/val/held.json": [HELD], "copy/other.json": [TRAINED]}
    context = context_over(tmp_path, tokenizer, rows, held_out=str(tmp_path / held_out))
    (tmp_path / "link").symlink_to("data/val")
    (tmp_path / "link.json").symlink_to("data/val/held.json")
    (tmp_path / "hard").mkdir()
    os.link(tmp_path / "data/val/held.json", tmp_path / "hard/held.json")
    task = Instruct(InstructOptions(instruction_tuning_data_dir=str(tmp_path / "data")), context)
    assert [file.name for file in task.files] == ["rows.json"]
    dataset = task.dataset()
    assert len(dataset) == 1
    assert dataset.report.lines() == [
        "instruction_tuning_data_dir: 1 file is held out by eval_data_dir, and not trained on"
    ]
    other = task.reading(str(tmp_path / held_out), "eval_data_dir").dataset()
    assert (len(other), other.report.lines()) == (1, [])


def test_each_path_has_its_passes_in_an_epoch(tmp_path: Path, tokenizer: Any) -> None:
    rows = {name: [{"input": name, "target": str(n)} for n in range(4)] for name in ("a.json", "b.json", "c.json")}
    context = context_over(tmp_path, tokenizer, rows, held_out=str(tmp_path / "c.json"))
    paths = [str(tmp_path / name) for name in rows]

    def task(**options: Any) -> Instruct:
        return Instruct(build(InstructOptions, {"instruction_tuning_data_dir": paths} | options), context)

    plain: Any = task()
    plain.weights = (3.0, 2.0, 1.0)  # a name that a subclass may have for something else
    assert plain.dataset().sources == (Source(8, 8),)
    weighted = task(data_weights=[2, 0.5, 1])
    dataset = weighted.dataset()
    assert dataset.sources == (Source(4, 8, paths[0]), Source(4, 2, paths[1]))
    assert tokenizer.decode(dataset[5]["token_ids"]) == "<s>b.json\n1</s>"
    assert dataset.report.notes == [
        "instruction_tuning_data_dir: 1 file is held out by eval_data_dir, and not trained on"
    ]
    assert weighted.reading(paths[2], "eval_data_dir").dataset().sources == (Source(4, 4),)
    with pytest.raises(UserError, match=r"data_weights: 2 weights are given for 3 paths: .*a\.json, "):
        task(data_weights=[2, 0.5])


def test_nothing_is_left_out_where_nothing_would_be_left(tmp_path: Path, tokenizer: Any) -> None:
    context = context_over(tmp_path, tokenizer, {"rows.json": [TRAINED]}, held_out=str(tmp_path))
    task = Instruct(InstructOptions(instruction_tuning_data_dir=str(tmp_path / "rows.json")), context)
    assert (len(task.dataset()), task.dataset().report.lines()) == (1, [])


def test_what_is_held_out_need_not_be_files(tmp_path: Path, tokenizer: Any) -> None:
    """A plugin's task may read other things; `reading` says what is wrong with a place."""
    context = context_over(tmp_path, tokenizer, {"rows.json": [TRAINED]}, held_out="split:validation")
    assert Instruct(InstructOptions(instruction_tuning_data_dir=str(tmp_path / "rows.json")), context).files
