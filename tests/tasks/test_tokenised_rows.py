"""Rows that are tokenised already: the samples of a task, given back to it, are the same samples."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from panda.data.json_reader import JsonReader
from panda.registry import NoOptions
from panda.registry.contexts import ReaderContext
from panda.registry.contexts import TaskContext
from panda.tasks.instruct import Instruct
from panda.tasks.instruct import InstructOptions
from panda.tasks.pretrain import Pretrain
from panda.tasks.pretrain import PretrainOptions

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def samples(dataset: Any) -> list[tuple[list[int], list[bool]]]:
    return [(ids.tolist(), mask.tolist()) for ids, mask in (dataset[index].values() for index in range(len(dataset)))]


def as_row(ids: np.ndarray, supervised: np.ndarray, form: str) -> dict[str, Any]:
    if form == "mask":
        return {"input_ids": ids.tolist(), "loss_mask": supervised.astype(int).tolist()}
    labels = np.where(supervised, ids, -100).tolist()
    if form == "labels":
        return {"input_ids": ids.tolist(), "labels": labels}
    return {
        "input_ids": [*ids.tolist(), 0, 0],
        "labels": [*labels, -100, -100],
        "attention_mask": [*[1] * len(ids), 0, 0],
    }


@pytest.mark.parametrize("task", ["instruct", "pretrain"])
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5), st.sampled_from(["labels", "mask", "padded"]))
def test_the_samples_of_a_task_come_back_as_they_are(
    tmp_path_factory: pytest.TempPathFactory, embedded_tokenizer: Any, task: str, rows: list[Any], form: str
) -> None:
    file = tmp_path_factory.mktemp("rows") / "rows.json"

    def dataset(written: list[Any]) -> Any:
        file.write_text(json.dumps(written))
        context = TaskContext(embedded_tokenizer, JsonReader(NoOptions(), ReaderContext()), 20)
        if task == "instruct":
            return Instruct(InstructOptions(instruction_tuning_data_dir=str(file)), context).dataset()
        return Pretrain(PretrainOptions(pretraining_data_dir=str(file)), context).dataset()

    first = dataset([{"input": a, "target": b, "text": a + b} for a, b in rows])
    again = dataset([as_row(*first[index].values(), form) for index in range(len(first))])
    assert samples(again) == samples(first)
    assert again.fingerprint == first.fingerprint and again.report.truncated == 0


def test_rows_of_tokens_and_of_text_keep_their_order(instruct: Any, pretrain: Any) -> None:
    rows = [{"input": "a", "target": "b"}, {"input_ids": [7, 8], "labels": [-100, 8]}, {"input": "c", "target": "d"}]
    found = samples(instruct(rows).dataset())
    assert found[1] == ([7, 8], [False, True]) and found[0][0][0] == found[2][0][0] != 7
    texts = [{"text": "a"}, {"input_ids": [7, 8, 9]}, {"text": "c"}]
    assert [ids for ids, _ in samples(pretrain(texts).dataset())] == [[1, 100, 2], [7, 8, 9], [1, 102, 2]]


def test_a_row_that_is_too_long_is_cut_and_counted_and_a_document_is_divided(instruct: Any, pretrain: Any) -> None:
    ids = list(range(3, 33))
    row = {"input_ids": ids, "labels": [-100] * 5 + ids[5:]}
    unusable = {"input_ids": ids, "labels": [-100] * 29 + ids[29:]}
    dataset = instruct([row, unusable], max_seq_length=10).dataset()
    assert samples(dataset) == [(ids[:10], [False] * 5 + [True] * 5)]
    assert dataset.report.truncated == 1
    assert "none of its first 10 tokens carries loss" in str(dataset.report.first_bad_rows[0])
    windows = samples(pretrain([row], max_seq_length=10).dataset())
    assert [window for window, _ in windows] == [ids[:10], ids[9:19], ids[18:28], ids[27:]]
    assert sum(sum(mask) for _, mask in windows) == 25
    [(window, mask)] = samples(pretrain([unusable], max_seq_length=10).dataset())
    assert (window, mask) == (ids[27:], [False, False, True])


def test_a_field_that_is_named_is_read_all_the_same(instruct: Any, pretrain: Any) -> None:
    row = {"input_ids": [7, 8], "labels": [7, 8], "q": "a", "a": "b"}
    named = instruct([row], input_field="q", target_field="a").dataset()
    assert named.report.unused == {"input_ids": 1, "labels": 1}
    assert samples(pretrain([row], content_field="q").dataset())[0][0] == [1, 100, 2]


def test_prompts_to_try_are_those_of_text_and_the_beginnings_of_documents(instruct: Any, pretrain: Any) -> None:
    rows = [{"input_ids": [1, 100, 101], "labels": [1, 100, 101]}, {"input": "a", "target": "b", "text": "c"}]
    assert instruct(rows).example_prompts(2) == ["a"]
    assert pretrain(rows).example_prompts(2) == ["ab", "c"]
