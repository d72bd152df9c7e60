"""A part of the samples, and a part that is held out: by arithmetic, from each data set, and never both."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from panda.data.held_out import shared_samples
from panda.data.selection import trained_and_held_out
from panda.data.token_dataset import MixedDataset
from panda.data.token_dataset import SampleBlock
from panda.data.token_dataset import SampleSet
from panda.data.token_dataset import TokenDataset
from panda.registry import UserError


def numbered(first: int, count: int) -> TokenDataset:
    """Samples of different tokens, lengths and supervised tokens: sample n begins with the token n."""
    block = SampleBlock()
    for number in range(first, first + count):
        length = 2 + number % 5
        block.add([number] * length, b"\0" + bytes(at <= number % 3 for at in range(length - 1)))
    block.report.truncated = 3
    return TokenDataset.of(block)


def numbers_of(samples: SampleSet) -> list[int]:
    return [int(samples[index]["token_ids"][0]) for index in range(len(samples))]


def split(dataset: SampleSet, fraction: float = 0.0, limit: int | None = None, seed: int = 0) -> list[list[int]]:
    parts = trained_and_held_out(dataset, max_samples=limit, eval_fraction=fraction, seed=seed)
    return [numbers_of(part) if part else [] for part in parts]


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.0, 0.1, 0.5, 0.9]), st.integers(1, 50))
def test_each_sample_that_is_used_is_on_one_side(first: int, second: int, fraction: float, limit: int) -> None:
    mixed = MixedDataset([("a", numbered(0, first), 1.0), ("b", numbered(first, second), 2.0)])
    used = [min(first, limit), min(second, limit)]
    held = [min(count - 1, round(fraction * count)) for count in used]
    if fraction and not any(held):
        with pytest.raises(UserError, match="less than one"):
            split(mixed, fraction, limit)
        return
    trained, held_out = trained_and_held_out(mixed, max_samples=limit, eval_fraction=fraction, seed=7)
    kept, others = numbers_of(trained), numbers_of(held_out) if held_out else []
    assert sorted(kept + others) == [*range(used[0]), *range(first, first + used[1])]
    assert len([number for number in others if number < first]) == held[0]
    assert [source.samples for source in trained.sources] == [used[0] - held[0], used[1] - held[1]]
    assert trained.sources[1].per_epoch == 2 * trained.sources[1].samples
    for part, numbers in ((trained, kept), (held_out, others)):
        if part:
            assert part.lengths(np.arange(len(part))).tolist() == [2 + number % 5 for number in numbers]
            assert part.tokens == sum(2 + number % 5 for number in numbers)
            assert part.supervised_tokens == sum(int(mixed[number]["supervised"].sum()) for number in numbers)
            assert shared_samples(mixed, part) == len(numbers)
    assert held_out is None or shared_samples(trained, held_out) == 0


def test_without_a_fraction_the_first_samples_are_used_in_their_order() -> None:
    assert split(numbered(0, 10), limit=4) == [[0, 1, 2, 3], []]
    whole = numbered(0, 10)
    assert trained_and_held_out(whole, max_samples=None, eval_fraction=0.0, seed=0) == (whole, None)


def test_the_seed_decides_which_samples_are_held_out() -> None:
    first, again, other = (split(numbered(0, 100), 0.2, seed=seed)[1] for seed in (0, 0, 1))
    assert first == again and sorted(first) != sorted(other)
    assert sorted(first) != list(range(20))


def test_selections_are_known_apart_and_reach_other_processes() -> None:
    prints = set()
    for limit, fraction, seed in ((None, 0.2, 0), (None, 0.2, 1), (None, 0.4, 0), (5, 0.2, 0), (5, 0.0, 0)):
        for part in trained_and_held_out(numbered(0, 20), max_samples=limit, eval_fraction=fraction, seed=seed):
            if part:
                prints.add(part.fingerprint)
                assert numbers_of(pickle.loads(pickle.dumps(part))) == numbers_of(part)
    assert len(prints) == 9


def test_it_is_said_and_what_is_cut_is_counted_among_all_samples() -> None:
    trained, held_out = trained_and_held_out(numbered(0, 20), max_samples=10, eval_fraction=0.2, seed=0)
    assert trained.report.lines() == [
        "max_samples: 10 of 20 samples are used, the first of each data set",
        "eval_fraction: 2 of 10 samples are held out, and not trained on",
    ]
    assert trained.report.cut(len(trained), 5).startswith("3 of 20 samples (15.0%)")
    assert held_out is not None and held_out.report.lines() == []
