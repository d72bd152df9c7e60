"""Samples in flat arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from panda.data.reading import Row
from panda.data.token_dataset import SampleBlock
from panda.data.token_dataset import TokenDataset

samples = st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=12).flatmap(
    lambda ids: st.tuples(st.just(ids), st.integers(1, len(ids) - 1))
)


def mask(token_ids: list[int], unsupervised: int) -> bytes:
    return bytes(unsupervised) + b"\1" * (len(token_ids) - unsupervised)


@given(st.lists(samples, max_size=8))
def test_samples_come_out_as_they_were_added(added: list[tuple[list[int], int]]) -> None:
    block = SampleBlock()
    for token_ids, unsupervised in added:
        block.add(token_ids, mask(token_ids, unsupervised))
    dataset = TokenDataset.of(block)
    assert len(dataset) == len(added)
    for index, (token_ids, unsupervised) in enumerate(added):
        ids, supervised = dataset[index].values()
        assert ids.tolist() == token_ids
        assert supervised.tolist() == [position >= unsupervised for position in range(len(token_ids))]
    assert dataset.tokens == sum(len(token_ids) for token_ids, _ in added)
    assert dataset.supervised_tokens == sum(len(token_ids) - unsupervised for token_ids, unsupervised in added)


def test_the_arrays_have_the_promised_types() -> None:
    block = SampleBlock()
    block.add([1, 2, 3], bytes([0, 1, 1]))
    dataset = TokenDataset.of(block)
    assert (
        dataset.arrays["token_ids"].dtype,
        dataset.arrays["supervised"].dtype,
        dataset.offsets["token_ids"].dtype,
    ) == (np.int32, np.bool_, np.int64)
    assert dataset.offsets["token_ids"].tolist() == [0, 3]


def test_a_row_without_a_token_to_predict_is_a_bad_one() -> None:
    """As where a damaged tokenizer makes no tokens of an answer; fuzzed models have found it."""
    block = SampleBlock()
    block.rows = [Row({}, Path("a.json"), number) for number in (7, 8)]
    for number, supervised in enumerate((bytes(2), bytes([0, 1]))):
        block.begin(number)
        block.add([1, 2], supervised)
    assert len(block) == 1
    assert block.report.first_bad_lines() == ["a.json, row 7: the tokenizer makes no tokens of an answer"]


def test_a_block_without_samples_makes_a_data_set_without() -> None:
    dataset = TokenDataset.of(SampleBlock())
    assert (len(dataset), dataset.tokens, dataset.supervised_tokens) == (0, 0, 0)


@pytest.mark.parametrize("supervised", [[1, 1, 1], [0, 0, 0], [0, 1], [0, 1, 1, 1]])
def test_a_sample_has_a_token_to_start_from_and_one_to_learn(supervised: list[int]) -> None:
    with pytest.raises(AssertionError):
        SampleBlock().add([1, 2, 3], bytes(supervised))
