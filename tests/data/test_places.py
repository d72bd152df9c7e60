"""Of which row of which file each sample is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from panda.data.auto_reader import AutoOptions
from panda.data.auto_reader import AutoReader
from panda.data.places import place_of
from panda.data.selection import trained_and_held_out
from panda.data.token_cache import TokenCache
from panda.data.token_dataset import SampleBlock
from panda.data.token_dataset import TokenDataset
from panda.registry.contexts import ReaderContext
from panda.registry.contexts import TaskContext
from panda.registry.location import resolve_path
from panda.tasks.instruct import Instruct
from panda.tasks.instruct import InstructOptions
from panda.tasks.pretrain import Pretrain
from panda.tasks.pretrain import PretrainOptions


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(resolve_path("panda:data/sample/tokenizer")), local_files_only=True)


def context(tokenizer: Any, cache: TokenCache | None = None, length: int = 40) -> TaskContext:
    return TaskContext(tokenizer, AutoReader(AutoOptions(), ReaderContext()), length, token_cache=cache)


def written(folder: Path) -> Path:
    """Three files of rows; that of the first, and the second of the next, cannot be used."""
    data = folder / "data"
    data.mkdir()
    (data / "0.json").write_text(json.dumps([{"input": "bad"}]))
    rows = [{"input": "first", "target": "a"}, {"input": "bad"}, {"input": "third", "target": "b"}]
    (data / "a.json").write_text(json.dumps(rows))
    (data / "b.jsonl").write_text("".join(json.dumps({"input": f"b{n}", "target": "c"}) + "\n" for n in (1, 2)))
    return data


def places(dataset: Any) -> list[str | None]:
    return [place_of(dataset, number) for number in range(len(dataset))]


@pytest.mark.parametrize("cached", [False, True])
def test_samples_name_their_rows(tmp_path: Path, tokenizer: Any, cached: bool) -> None:
    data = written(tmp_path)
    cache = TokenCache(tmp_path / "cache") if cached else None
    expected = [f"{data}/a.json:1", f"{data}/a.json:3", f"{data}/b.jsonl:1", f"{data}/b.jsonl:2"]
    for _ in range(2):  # made, then read
        dataset = Instruct(InstructOptions(instruction_tuning_data_dir=str(data)), context(tokenizer, cache)).dataset()
        assert places(dataset) == expected
    for sample, word in zip(range(4), ("first", "third", "b1", "b2"), strict=True):
        assert word in tokenizer.decode(dataset[sample]["token_ids"])
    moved = tmp_path / "moved"
    data.rename(moved)  # the cache goes by content, and names are those of now
    moved_dataset = Instruct(
        InstructOptions(instruction_tuning_data_dir=str(moved)), context(tokenizer, cache)
    ).dataset()
    assert places(moved_dataset)[3] == f"{moved}/b.jsonl:2"


def test_windows_of_a_document_and_parts_of_a_mix_do_too(tmp_path: Path, tokenizer: Any) -> None:
    texts = ["a" * 30, "b" * 100, "c"]
    for name, some in (("x.jsonl", texts[:2]), ("y.jsonl", texts[2:])):
        (tmp_path / name).write_text("".join(json.dumps({"title": "", "content": text}) + "\n" for text in some))
    paths = (str(tmp_path / "y.jsonl"), str(tmp_path / "x.jsonl"))
    options = PretrainOptions(pretraining_data_dir=paths, data_weights=(1.0, 2.0))
    dataset = Pretrain(options, context(tokenizer)).dataset()
    found = places(dataset)
    assert found[:2] == [f"{tmp_path}/y.jsonl:1", f"{tmp_path}/x.jsonl:1"]
    assert found[2:] == [f"{tmp_path}/x.jsonl:2"] * (len(dataset) - 2) and len(dataset) > 4
    trained, held = trained_and_held_out(dataset, max_samples=None, eval_fraction=0.4, seed=1)
    for part in (trained, held):
        assert part is not None
        for number in range(len(part)):
            letter = str(place_of(part, number)).removeprefix(f"{tmp_path}/")
            text = tokenizer.decode(part[number]["token_ids"])
            assert {"y.jsonl:1": "c", "x.jsonl:1": "a", "x.jsonl:2": "b"}[letter] in text


def test_a_task_that_does_not_say_has_no_rows() -> None:
    block = SampleBlock()
    block.add([1, 2], b"\0\1")
    block.begin(0)  # of nothing that is known
    block.add([1, 2], b"\0\1")
    other = SampleBlock()
    other.extend(block)
    assert places(TokenDataset.of(other)) == [None, None]
    assert place_of(object(), 0) is None  # type: ignore[arg-type]
