"""How the samples of an optimizer step become rows, and the rows the micro batches of ranks.

Which samples a step has is decided in order.py. The loss of a step is a sum over its tokens, so any
layout of the same samples gives the same trajectory up to rounding: packing and grouping change only
the speed of a run.
"""

from __future__ import annotations

from bisect import bisect_left
from bisect import insort
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from panda.data.order import BatchPlan
from panda.data.order import SampleOrder
from panda.data.token_dataset import SampleSet

Row = list[int]
"""Numbers of the samples that share a row."""
RowLength = Callable[[int], int]
"""The length to which a row of so many tokens is padded."""
FILLING_SAMPLES = 5000
"""The fullness and the shapes of rows are those of so many samples, the first of the run, and of one step at least."""


def exact_length(tokens: int) -> int:
    """``tokens``, where every length of a row is as good as another."""
    return tokens


def one_of_few_lengths(tokens: int) -> int:
    """The smallest of a few lengths that holds ``tokens``: multiples of 8, and eight of them up to each power of two.

    torch compiles code for the lengths that it meets, and a GPU has faster kernels for such lengths than for others.
    """
    step = max(8, 1 << max(0, (tokens - 1).bit_length() - 4))
    return -(-tokens // step) * step


def in_order(
    samples: np.ndarray, lengths: np.ndarray, capacity: int, at_once: int, row_length: RowLength = exact_length
) -> list[Row]:
    """One sample a row, in the order given."""
    return [[int(sample)] for sample in samples]


def by_length(
    samples: np.ndarray, lengths: np.ndarray, capacity: int, at_once: int, row_length: RowLength = exact_length
) -> list[Row]:
    """One sample a row, samples of similar length together, so that a micro batch has little padding."""
    return [[int(sample)] for sample in samples[np.argsort(-lengths, kind="stable")]]


def best_fit(samples: np.ndarray, lengths: np.ndarray, capacity: int) -> list[Row]:
    """Several samples a row of ``capacity`` tokens: the longest first, each in the fullest row that has room.

    Best fit decreasing needs at most 11/9 of the smallest possible number of rows, plus one (Johnson 1973).
    """
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # the free tokens of a row, and the row; sorted
    for place in np.argsort(-lengths, kind="stable"):
        sample, length = int(samples[place]), int(lengths[place])
        assert length <= capacity
        fitting = bisect_left(room, (length, -1))
        if fitting < len(room):
            free, row = room.pop(fitting)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(sample)
        insort(room, (free - length, row))
    return rows


def packed(
    samples: np.ndarray, lengths: np.ndarray, capacity: int, at_once: int, row_length: RowLength = exact_length
) -> list[Row]:
    """Rows of best fit, no longer than they have to be.

    All ranks together take ``at_once`` rows in a micro batch, and rows of full capacity leave some places
    of the last micro batch empty. Shorter rows fill those places: the number of micro batches stays the
    same, ranks are loaded evenly, and attention, whose cost grows with the square of a row, costs less. What
    ``row_length`` would pad is filled.
    """
    rows = best_fit(samples, lengths, capacity)
    places = -(-len(rows) // at_once) * at_once
    shorter = max(int(lengths.max()), -(-int(lengths.sum()) // places))
    while (length := row_length(shorter)) < capacity:
        tried = best_fit(samples, lengths, length)
        if len(tried) <= places:
            return tried
        shorter = length + -(-length // 32)
    return rows


LAYOUTS: dict[str, Callable[[np.ndarray, np.ndarray, int, int, RowLength], list[Row]]] = {
    "padded": in_order,
    "grouped": by_length,
    "packed": packed,
}
"""The values of the option ``batching``."""


class Filling(NamedTuple):
    """How full rows are: tokens that are not padding, and samples."""

    share: float
    """Of the tokens that the model is given, the share that is not padding."""
    samples: float
    """Samples of a row, on average."""
    tokens: float
    """Tokens of a row that are not padding, on average."""
    steps: int
    """Optimizer steps that were counted."""

    def __str__(self) -> str:
        return f"{self.share:.1%} data, {self.samples:.1f} samples and {self.tokens:,.0f} tokens a row"


@dataclass(frozen=True)
class Layout:
    """The rows of each step of a run."""

    dataset: SampleSet
    order: SampleOrder
    plan: BatchPlan
    batching: str
    max_seq_length: int
    few_lengths: bool = False
    """Whether rows are padded to one of a few lengths, and not only to the longest of their micro batch."""

    def row_length(self, tokens: int) -> int:
        """The length of the rows of a micro batch, whose longest has ``tokens``."""
        return min(one_of_few_lengths(tokens), self.max_seq_length) if self.few_lengths else tokens

    @property
    def packed(self) -> bool:
        """Whether rows hold several samples."""
        return self.batching == "packed"

    def micro_batches(self, step: int) -> list[list[list[Row]]]:
        """The rows of micro batch m of rank r of optimizer step ``step`` (counted from 1), as ``[m][r]``.

        Every rank has the same number of micro batches; rows are dealt evenly, and some have none where rows
        are few.
        """
        samples = self.order.samples(self.plan.positions(step))
        plan = self.plan
        at_once = plan.micro_batch * plan.ranks
        lengths = self.dataset.lengths(samples)
        rows = LAYOUTS[self.batching](samples, lengths, self.max_seq_length, at_once, self.row_length)
        places = -(-len(rows) // at_once) * plan.ranks
        share, more = divmod(len(rows), places)
        starts = [place * share + min(place, more) for place in range(places + 1)]
        dealt = [rows[start:end] for start, end in pairwise(starts)]
        return [dealt[first : first + plan.ranks] for first in range(0, places, plan.ranks)]

    def shapes(self) -> Counter[tuple[int, int]]:
        """How many micro batches of the first steps have so many rows of such a length: ``(rows, length)``.

        Of the run's first steps where it is resumed, too: code is chosen by them, and other code rounds differently.
        """
        whole = replace(self, plan=replace(self.plan, start_step=0, start_position=0))
        return Counter(
            (max(1, len(filled)), self.row_length(max(filled, default=2)))
            for micro_batch in whole._first_micro_batches()
            for filled in map(self.filled_of, micro_batch)
        )

    def filling(self) -> Filling:
        """How full the rows of the first steps are."""
        tokens = cells = samples = rows = 0
        for micro_batch in self._first_micro_batches():
            for of_rank in micro_batch:
                filled = self.filled_of(of_rank)
                tokens += sum(filled)
                cells += self.row_length(max(filled, default=0)) * len(filled)
                samples += sum(map(len, of_rank))
                rows += len(of_rank)
        return Filling(tokens / max(1, cells), samples / max(1, rows), tokens / max(1, rows), len(self._first_steps))

    @property
    def _first_steps(self) -> range:
        """The steps of the first ``FILLING_SAMPLES`` samples, at least one."""
        plan = self.plan
        return range(plan.start_step + 1, plan.total_steps + 1)[: max(1, FILLING_SAMPLES // plan.step_samples)]

    def _first_micro_batches(self) -> Iterator[list[list[Row]]]:
        for step in self._first_steps:
            yield from self.micro_batches(step)

    def filled_of(self, rows: list[Row]) -> list[int]:
        """The tokens of each of ``rows`` that are not padding."""
        return [int(self.dataset.lengths(np.array(row)).sum()) for row in rows]
