"""Rows of a step: every sample in one, whatever the layout, and dealt to ranks evenly."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from panda.data.order import BatchPlan
from panda.data.order import SampleOrder
from panda.data.packing import FILLING_SAMPLES
from panda.data.packing import LAYOUTS
from panda.data.packing import Layout
from panda.data.packing import best_fit
from panda.data.packing import by_length
from panda.data.packing import in_order
from panda.data.packing import one_of_few_lengths
from panda.data.packing import packed
from panda.data.token_dataset import SampleBlock
from panda.data.token_dataset import TokenDataset

CAPACITY = 20
lengths_of_samples = st.lists(st.integers(2, CAPACITY), min_size=1, max_size=40)


def dataset_of(lengths: list[int]) -> TokenDataset:
    block = SampleBlock()
    for number, length in enumerate(lengths):
        block.add([number] * length, bytes([0] + [1] * (length - 1)))
    return TokenDataset.of(block)


def layout_of(lengths: list[int], batching: str, *, few_lengths: bool = False, **changes: Any) -> Layout:
    dataset = dataset_of(lengths)
    plan = BatchPlan(
        **({"samples": len(lengths), "micro_batch": 2, "accumulation": 2, "ranks": 1, "epochs": 1} | changes)
    )
    return Layout(dataset, SampleOrder(dataset.sources, seed=3), plan, batching, CAPACITY, few_lengths)


def step_samples(layout: Layout, step: int) -> list[int]:
    return [s for micro in layout.micro_batches(step) for rank in micro for row in rank for s in row]


@given(lengths_of_samples)
def test_best_fit_puts_every_sample_in_one_row_that_holds_it(lengths: list[int]) -> None:
    rows = best_fit(np.arange(len(lengths)), np.array(lengths), CAPACITY)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert all(sum(lengths[sample] for sample in row) <= CAPACITY for row in rows)


@given(lengths_of_samples)
def test_best_fit_wastes_little(lengths: list[int]) -> None:
    rows = best_fit(np.arange(len(lengths)), np.array(lengths), CAPACITY)
    fill = sorted(sum(lengths[sample] for sample in row) for row in rows)
    assert all(a + b > CAPACITY for a, b in pairwise(fill)), "two rows would fit in one"


def test_best_fit_takes_the_fullest_row_that_has_room() -> None:
    lengths = np.array([12, 14, 5, 6])
    assert best_fit(np.arange(4), lengths, CAPACITY) == [[1, 3], [0, 2]]


@given(lengths_of_samples)
def test_packing_again_gives_the_same_rows(lengths: list[int]) -> None:
    """Ties are broken by position, and not by anything of the process."""
    samples = np.arange(len(lengths))
    assert best_fit(samples, np.array(lengths), CAPACITY) == best_fit(samples, np.array(lengths), CAPACITY)


@given(lengths_of_samples)
def test_grouping_orders_by_length_and_the_plain_layout_does_not(lengths: list[int]) -> None:
    samples, measured = np.arange(len(lengths)), np.array(lengths)
    assert in_order(samples, measured, CAPACITY, 1) == [[sample] for sample in range(len(lengths))]
    grouped = [lengths[sample] for [sample] in by_length(samples, measured, CAPACITY, 1)]
    assert grouped == sorted(lengths, reverse=True)


@pytest.mark.parametrize("batching", LAYOUTS)
@given(
    lengths=lengths_of_samples,
    micro=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    ranks=st.integers(1, 4),
)
def test_every_step_has_its_samples_in_any_layout_and_split(
    batching: str, lengths: list[int], micro: int, accumulation: int, ranks: int
) -> None:
    layout = layout_of(lengths, batching, micro_batch=micro, accumulation=accumulation, ranks=ranks)
    for step in range(1, layout.plan.total_steps + 1):
        expected = layout.order.samples(layout.plan.positions(step)).tolist()
        assert sorted(step_samples(layout, step)) == sorted(expected)
        if batching == "padded":
            assert step_samples(layout, step) == expected
        micro_batches = layout.micro_batches(step)
        assert 1 <= len(micro_batches) <= accumulation
        sizes = [len(of_rank) for each in micro_batches for of_rank in each]
        assert all(len(each) == ranks for each in micro_batches)
        assert max(sizes) <= micro and max(sizes) - min(sizes) <= 1


@given(lengths_of_samples, st.integers(1, 8))
def test_packed_rows_are_shorter_where_that_costs_no_micro_batch(lengths: list[int], at_once: int) -> None:
    samples, measured = np.arange(len(lengths)), np.array(lengths)
    full, rows = best_fit(samples, measured, CAPACITY), packed(samples, measured, CAPACITY, at_once)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert -(-len(rows) // at_once) == -(-len(full) // at_once)
    assert all(sum(lengths[sample] for sample in row) <= CAPACITY for row in rows)


def test_packed_rows_fill_the_places_of_a_micro_batch() -> None:
    lengths = np.array([5] * 8)
    assert len(best_fit(np.arange(8), lengths, CAPACITY)) == 2
    assert packed(np.arange(8), lengths, CAPACITY, at_once=4) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert packed(np.arange(8), lengths, CAPACITY, at_once=2) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@given(lengths_of_samples, st.sampled_from([(8, 1, 1), (4, 1, 2), (2, 1, 4), (1, 1, 8)]))
def test_a_packed_step_has_the_same_rows_on_any_number_of_ranks(
    lengths: list[int], split: tuple[int, int, int]
) -> None:
    """Where they take as many rows at once."""
    micro, accumulation, ranks = split
    one = layout_of(lengths, "packed", micro_batch=8, accumulation=1)
    other = replace(one, plan=replace(one.plan, micro_batch=micro, accumulation=accumulation, ranks=ranks))
    for step in range(1, one.plan.total_steps + 1):
        rows = [
            [row for micro in layout.micro_batches(step) for rank in micro for row in rank] for layout in (one, other)
        ]
        assert rows[0] == rows[1]


def test_filling_is_the_share_of_tokens_that_are_data_and_what_is_in_a_row() -> None:
    lengths = [10, 10, 4, 16]
    assert layout_of(lengths, "packed").filling() == (1.0, 2.0, 20.0, 1)
    grouped = layout_of(lengths, "grouped").filling()
    assert grouped == (40 / (16 * 2 + 10 * 2), 1.0, 10.0, 1)
    assert layout_of(lengths, "padded").filling().share <= grouped.share


def test_filling_looks_at_as_many_samples_whatever_the_size_of_a_step() -> None:
    """A large step takes seconds to pack."""
    lengths = [2] * (3 * FILLING_SAMPLES)
    assert layout_of(lengths, "padded", accumulation=5).filling().steps == FILLING_SAMPLES // 10
    assert layout_of(lengths, "padded", accumulation=FILLING_SAMPLES).filling().steps == 1
    assert layout_of(lengths, "padded", start_step=7, start_position=3 * FILLING_SAMPLES - 4).filling().steps == 1


def test_filling_of_a_run_that_goes_on_is_that_of_the_steps_to_come() -> None:
    assert layout_of([2, 2, 2, 2], "packed", start_step=1, start_position=4, epochs=2).filling() == (1.0, 2.0, 4.0, 1)
    assert layout_of([2, 2, 2, 2], "packed", start_step=1, start_position=4).filling().steps == 0


def test_shapes_are_those_of_the_micro_batches_of_all_ranks() -> None:
    lengths = [20, 20, 20, 20, 20, 20, 20, 9, 5]
    assert layout_of(lengths, "padded", micro_batch=1).shapes() == {(1, 20): 7, (1, 9): 1, (1, 5): 1}
    few = layout_of(lengths, "padded", micro_batch=1, few_lengths=True).shapes()
    assert few == {(1, 20): 7, (1, 16): 1, (1, 8): 1}
    # The last step has three rows for two ranks; one sample leaves a rank without a row.
    assert layout_of([20] * 7, "padded", accumulation=1, ranks=2).shapes() == {(2, 20): 3, (1, 20): 1}
    assert layout_of([20], "padded", ranks=2).shapes() == {(1, 20): 1, (1, 2): 1}
    assert layout_of([10, 10, 4, 16], "packed").shapes() == {(2, 20): 1}


def test_shapes_of_a_run_that_goes_on_are_those_of_its_beginning() -> None:
    """Code for a shape that came to be usual later would round in another way than that of the run without a break."""
    lengths = [20] * 30 + [2] * 30
    goes_on = layout_of(lengths, "padded", micro_batch=1, start_step=29, start_position=58)
    assert goes_on.shapes() == layout_of(lengths, "padded", micro_batch=1).shapes() == {(1, 20): 30, (1, 2): 30}


def test_few_lengths_are_eight_to_a_doubling_and_multiples_of_8() -> None:
    lengths = sorted({one_of_few_lengths(tokens) for tokens in range(1, 4097)})
    assert lengths[:8] == [8, 16, 24, 32, 40, 48, 56, 64]
    assert [length for length in lengths if 1024 < length <= 2048] == [1024 + 128 * n for n in range(1, 9)]
    assert not any(length % 8 for length in lengths)
    for tokens in range(1, 4097):
        length = one_of_few_lengths(tokens)
        assert tokens <= length < max(tokens + 8, tokens * 9 / 8)
        assert one_of_few_lengths(length) == length


@pytest.mark.parametrize("batching", LAYOUTS)
@given(lengths=lengths_of_samples, micro=st.integers(1, 5))
def test_rows_of_few_lengths_hold_the_same_samples_in_as_many_micro_batches(
    batching: str, lengths: list[int], micro: int
) -> None:
    layout = layout_of(lengths, batching, few_lengths=True, micro_batch=micro)
    exact = layout_of(lengths, batching, micro_batch=micro)
    for step in range(1, layout.plan.total_steps + 1):
        assert sorted(step_samples(layout, step)) == sorted(step_samples(exact, step))
        assert len(layout.micro_batches(step)) == len(exact.micro_batches(step))
        for row in (row for each in layout.micro_batches(step) for of_rank in each for row in of_rank):
            tokens = sum(int(layout.dataset.lengths(np.array([sample]))[0]) for sample in row)
            assert tokens <= layout.row_length(tokens) <= CAPACITY


def test_packed_rows_fill_what_would_be_padded() -> None:
    """Four rows of 9 tokens would be padded to 16: two samples fit in each of three, and the fourth is shorter."""
    lengths = np.array([5, 4] * 4)
    exact = packed(np.arange(8), lengths, CAPACITY, at_once=4)
    few = packed(np.arange(8), lengths, CAPACITY, 4, one_of_few_lengths)
    assert [int(lengths[row].sum()) for row in exact] == [9, 9, 9, 9]
    assert [int(lengths[row].sum()) for row in few] == [15, 13, 8]


def test_filling_counts_the_padding_to_few_lengths() -> None:
    lengths = [10, 10, 4, 16]
    grouped = layout_of(lengths, "grouped", few_lengths=True).filling()
    assert grouped.share == 40 / (16 * 2 + 16 * 2)
    assert layout_of([18, 18], "grouped", few_lengths=True).filling().share == 36 / (CAPACITY * 2)
