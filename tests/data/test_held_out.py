"""Held-out samples that are trained on as well are counted, wherever they come from."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from panda.data.held_out import note_shared_samples
from panda.data.held_out import shared_samples
from panda.data.token_dataset import MixedDataset
from panda.data.token_dataset import SampleBlock
from panda.data.token_dataset import TokenDataset

Samples = list[list[int]]
samples = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=4), min_size=1, max_size=12)


def made(of: Samples) -> TokenDataset:
    block = SampleBlock()
    for token_ids in of:
        block.add(token_ids, b"\0" + b"\1" * (len(token_ids) - 1))
    return TokenDataset.of(block)


class OfAPlugin:
    """A set of samples that knows no hashes of them."""

    def __init__(self, of: TokenDataset) -> None:
        self.of = of

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, index: int) -> Any:
        return self.of[index]

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return self.of.lengths(indices)


@given(samples, samples, samples)
def test_every_held_out_sample_that_is_trained_on_is_counted(one: Samples, other: Samples, held_out: Samples) -> None:
    expected = sum(sample in one + other for sample in held_out)
    mixed = MixedDataset([("a", made(one), 1.0), ("b", made(other), 0.5)])
    assert shared_samples(mixed, made(held_out)) == expected
    assert shared_samples(OfAPlugin(made(one + other)), OfAPlugin(made(held_out))) == expected  # type: ignore[arg-type]


def test_they_are_noted_only_where_there_are_some() -> None:
    trained, held_out = made([[1, 2], [3, 4, 5]]), made([[3, 4, 5], [3, 4], [3, 4, 5]])
    note_shared_samples(trained, held_out)
    assert held_out.report.lines() == ["2 of 3 held-out samples are also in the training data, and are trained on"]
    note_shared_samples(trained, others := made([[2, 1]]))
    assert others.report.lines() == trained.report.lines() == []
