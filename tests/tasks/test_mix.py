"""The mix task: instruct and pretrain samples in one run, each as often as its weight says."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from panda.data.json_reader import JsonReader
from panda.data.order import SampleOrder
from panda.registry import NoOptions
from panda.registry import UserError
from panda.registry.contexts import ReaderContext
from panda.registry.contexts import TaskContext
from panda.registry.options import build
from panda.tasks.mix import Mix
from panda.tasks.mix import MixOptions

INSTRUCT = [{"input": f"ask {n}", "target": f"say {n}"} for n in range(4)]
PRETRAIN = [{"title": f"title {n}", "content": "text"} for n in range(10)]


@pytest.fixture
def mix(tmp_path: Path, tokenizer: Any) -> Any:
    """``mix(instruct_weight=2)``: the task over both; ``mix(instruct=False)`` over the other alone."""
    (tmp_path / "i.json").write_text(json.dumps(INSTRUCT))
    (tmp_path / "p.json").write_text(json.dumps(PRETRAIN))

    def make(instruct: bool = True, pretrain: bool = True, **options: Any) -> Mix:
        context = TaskContext(tokenizer, JsonReader(NoOptions(), ReaderContext()), 50)
        places = {
            "instruction_tuning_data_dir": str(tmp_path / "i.json") if instruct else None,
            "pretraining_data_dir": str(tmp_path / "p.json") if pretrain else None,
        }
        return Mix(build(MixOptions, places | options), context)

    return make


def epoch(task: Mix, number: int = 0) -> Counter[str]:
    """The texts of an epoch, without special tokens."""
    dataset = task.dataset()
    order = SampleOrder(dataset.sources, seed=1)
    positions = range(number * order.epoch_samples, (number + 1) * order.epoch_samples)
    samples = [dataset[index]["token_ids"] for index in order.samples(positions).tolist()]
    return Counter(task.tokenizer.decode(ids, skip_special_tokens=True) for ids in samples)


ASKED = [f"ask {n}\nsay {n}" for n in range(4)]
TOLD = [f"title {n}\ntext" for n in range(10)]


def test_an_epoch_has_each_sample_once_where_weights_are_one(mix: Any) -> None:
    assert epoch(mix()) == Counter(ASKED + TOLD)


def test_a_part_may_have_a_weight_for_each_of_its_paths(mix: Any, tmp_path: Path) -> None:
    (tmp_path / "more.json").write_text(json.dumps(PRETRAIN[:4]))
    paths = (str(tmp_path / "p.json"), str(tmp_path / "more.json"))
    task = mix(pretraining_data_dir=paths, pretrain_weight=(0.5, 3), instruct_weight=2)
    assert [(source.name, source.per_epoch) for source in task.dataset().sources] == [
        ("instruct", 8),
        (f"pretrain {paths[0]}", 5),
        (f"pretrain {paths[1]}", 12),
    ]
    assert [s.per_epoch for s in mix(pretraining_data_dir=paths, pretrain_weight=0.5).dataset().sources] == [4, 7]
    with pytest.raises(UserError, match="instruct_weight: 2 weights are given for 1 path"):
        mix(instruct_weight=(1, 2))


def test_a_weight_is_passes_over_a_source_in_an_epoch(mix: Any) -> None:
    task = mix(instruct_weight=3, pretrain_weight=0.5)
    first, second = epoch(task, 0), epoch(task, 1)
    assert [first[text] for text in ASKED] == [3, 3, 3, 3]
    assert sum(first[text] for text in TOLD) == 5
    both = first + second
    assert [both[text] for text in TOLD] == [1] * 10, "the second epoch goes on where the first one stopped"


def test_instruct_samples_keep_their_mask(mix: Any) -> None:
    dataset = mix().dataset()
    ids, supervised = dataset[0].values()
    assert ids[supervised].tolist() == [*(byte + 3 for byte in b"say 0"), 2]
    assert dataset[4]["supervised"].tolist() == [False] + [True] * (len(dataset[4]["token_ids"]) - 1)
    assert (dataset.report.files, dataset.report.rows) == (2, 14)
    assert dataset.tokens == sum(len(dataset[index]["token_ids"]) for index in range(14))


@pytest.mark.parametrize(("given", "texts"), [("instruct", ASKED), ("pretrain", TOLD)])
def test_either_alone_works(mix: Any, given: str, texts: list[str]) -> None:
    task = mix(instruct=given == "instruct", pretrain=given == "pretrain")
    assert epoch(task) == Counter(texts)
    assert task.example_prompts(1) == ["ask 0" if given == "instruct" else "title 0\ntext"]


def test_neither_is_refused(mix: Any) -> None:
    with pytest.raises(UserError, match="give instruction_tuning_data_dir, pretraining_data_dir, or both"):
        mix(instruct=False, pretrain=False)
    with pytest.raises(UserError, match="input_field and target_field"):
        mix(input_field="q")


def test_it_is_asked_as_in_instruct(mix: Any) -> None:
    assert mix().encode_prompt("ask 1") == [1, *(byte + 3 for byte in b"ask 1\n")]


def test_what_is_held_out_is_left_out_of_each_part(mix: Any, tmp_path: Path) -> None:
    context = mix().context
    (tmp_path / "held").mkdir()
    for name in ("i", "p"):
        (tmp_path / name / "val").mkdir(parents=True)
        (tmp_path / f"{name}.json").rename(tmp_path / name / "a.json")
        (tmp_path / name / "val" / "b.json").write_text(json.dumps([{"input": "x", "target": "y", "text": "z"}]))
        (tmp_path / "held" / name).symlink_to(tmp_path / name / "val")
    places = {"instruction_tuning_data_dir": str(tmp_path / "i"), "pretraining_data_dir": str(tmp_path / "p")}
    task = Mix(MixOptions(**places), replace(context, held_out=str(tmp_path / "held")))
    assert epoch(task) == Counter(ASKED + TOLD)
    assert task.dataset().report.lines() == [
        f"{key}: 1 file is held out by eval_data_dir, and not trained on" for key in places
    ]


@pytest.mark.parametrize("instruct", [True, False])
def test_other_data_is_read_as_the_first_of_its_parts_is(mix: Any, tmp_path: Path, instruct: bool) -> None:
    task = mix(instruct=instruct)
    row = INSTRUCT[2] if instruct else PRETRAIN[2]
    (tmp_path / "other.jsonl").write_text(json.dumps(row))
    other = task.reading(str(tmp_path / "other.jsonl"), "eval_data_dir").dataset()
    assert [other[n]["token_ids"].tolist() for n in range(len(other))] == [task.dataset()[2]["token_ids"].tolist()]
    with pytest.raises(UserError, match="eval_data_dir"):
        task.reading(str(tmp_path / "nowhere"), "eval_data_dir")
