"""The largest micro batch of a run, against a look at every micro batch of every step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from panda.data import largest
from panda.data.largest import largest_to_come
from panda.data.order import BatchPlan
from panda.data.order import SampleOrder
from panda.data.order import Source
from panda.data.packing import Layout

CAPACITY = 512
SHAPES = ((1, 1, 1), (4, 1, 1), (2, 4, 2), (8, 8, 1))
"""Micro batch, accumulation, ranks."""


class Lengths:
    """A data set of which only the lengths are known."""

    def __init__(self, lengths: list[int] | np.ndarray) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self.sources = (Source(len(self), len(self)),)

    def __len__(self) -> int:
        return len(self._lengths)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._lengths[indices]
        return found


def layout_of(lengths: Any, batching: str, shape: tuple[int, int, int] = (2, 2, 1), **changes: Any) -> Layout:
    dataset: Any = Lengths(lengths)
    micro_batch, accumulation, ranks = shape
    options = {"samples": len(dataset), "epochs": 2} | changes
    plan = BatchPlan(micro_batch=micro_batch, accumulation=accumulation, ranks=ranks, **options)
    return Layout(dataset, SampleOrder(dataset.sources, seed=3), plan, batching, CAPACITY)


def all_cells(layout: Layout) -> dict[tuple[int, int, int], int]:
    """Rows times padded length, by step, micro batch and rank, of every step that is still to come."""
    found = {}
    for step in range(layout.plan.start_step + 1, layout.plan.total_steps + 1):
        for number, of_ranks in enumerate(layout.micro_batches(step)):
            for rank, rows in enumerate(of_ranks):
                tokens = [sum(int(layout.dataset.lengths(np.array([sample]))[0]) for sample in row) for row in rows]
                found[step, number, rank] = len(rows) * layout.row_length(max(tokens, default=0))
    return found


@pytest.mark.parametrize("few_lengths", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batching", ["padded", "grouped", "packed"])
def test_no_micro_batch_to_come_is_larger(
    batching: str, shape: tuple[int, int, int], few_lengths: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(largest, "AT_ONCE", 100)  # of several stretches
    random, share = np.random.default_rng(0), 0.95 if batching == "packed" else 1.0
    found_some = 0
    for _ in range(6):
        lengths = np.exp(random.normal(4.5, 1, random.integers(100, 1000))).astype(int).clip(2, CAPACITY)
        layout = replace(layout_of(lengths, batching, shape), few_lengths=few_lengths)
        cells, found = all_cells(layout), largest_to_come(layout)
        now = max(count for (step, *_), count in cells.items() if step == 1)
        if found is None:
            assert now >= share * max(cells.values())
            continue
        found_some += 1
        assert found.cells == cells[found.step, found.number, found.rank] > now
        assert found.cells >= share * max(cells.values())
    assert found_some or batching == "packed"


def test_nothing_is_to_come_that_the_next_step_has() -> None:
    assert largest_to_come(layout_of([100] * 40, "padded")) is None
    assert largest_to_come(layout_of([100, 50, 20, 10], "padded", epochs=1)) is None  # one step


def test_a_continued_run_looks_at_what_is_left() -> None:
    lengths = [20] * 40
    order = SampleOrder([Source(40, 40)], seed=3)
    lengths[int(order.samples(range(17, 18))[0])] = 300  # in step 5
    whole = layout_of(lengths, "padded", epochs=1)
    found = largest_to_come(whole)
    assert found is not None and (found.step, found.rows, found.tokens) == (5, 2, 300)
    assert str(found) == "2 x 300 tokens"
    after = replace(whole, plan=replace(whole.plan, start_step=5, start_position=20))
    assert largest_to_come(after) is None
    short = replace(whole, plan=replace(whole.plan, max_steps=4))
    assert largest_to_come(short) is None  # which does not come as far


def test_among_equal_ones_it_is_not_the_first_of_its_step() -> None:
    lengths = [20] * 40
    for position in (16, 26, 32):  # the first, the second and the first micro batch of their steps
        lengths[int(SampleOrder([Source(40, 40)], seed=3).samples(range(position, position + 1))[0])] = 300
    found = largest_to_come(layout_of(lengths, "padded", epochs=1))
    assert found is not None and (found.step, found.number) == (7, 1)


def test_no_step_is_laid_out_but_those_that_promise_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Python that takes microseconds a sample, and a run can have many millions."""
    laid_out = []
    original = Layout.micro_batches
    monkeypatch.setattr(Layout, "micro_batches", lambda self, step: laid_out.append(step) or original(self, step))
    layout = layout_of(np.random.default_rng(0).integers(2, 500, 4000), "packed")
    largest_to_come(layout)
    assert len(laid_out) <= largest.LAID_OUT + 1
