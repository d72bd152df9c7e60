"""How the samples of an optimizer step become rows, and the rows the micro batches of ranks.

Which samples a step has is decided in order.py. The loss of a step is a sum over its tokens, so any
layout of the same samples gives the same trajectory up to rounding: packing and grouping change only
the speed of a run.
"""

from __future__ import annotations

from bisect import bisect_left
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from panda.data.order import BatchPlan
from panda.data.order import SampleOrder
from panda.data.token_dataset import SampleSet

Row = list[int]
"""Numbers of the samples that share a row."""
FILLING_SAMPLES = 5000
"""Samples at the start of a run from which it is reported how full rows are, whatever the size of a step."""


def in_order(samples: np.ndarray, lengths: np.ndarray, capacity: int, at_once: int) -> list[Row]:
    """One sample a row, in the order given."""
    return [[int(sample)] for sample in samples]


def by_length(samples: np.ndarray, lengths: np.ndarray, capacity: int, at_once: int) -> list[Row]:
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


def packed(samples: np.ndarray, lengths: np.ndarray, capacity: int, at_once: int) -> list[Row]:
    """Rows of best fit, no longer than they have to be.

    All ranks together take ``at_once`` rows in a micro batch, and rows of full capacity leave some places
    of the last micro batch empty. Shorter rows fill those places: the number of micro batches stays the
    same, ranks are loaded evenly, and attention, whose cost grows with the square of a row, costs less.
    """
    rows = best_fit(samples, lengths, capacity)
    places = -(-len(rows) // at_once) * at_once
    shorter = max(int(lengths.max()), -(-int(lengths.sum()) // places))
    while shorter < capacity:
        tried = best_fit(samples, lengths, shorter)
        if len(tried) <= places:
            return tried
        shorter += -(-shorter // 32)
    return rows


LAYOUTS: dict[str, Callable[[np.ndarray, np.ndarray, int, int], list[Row]]] = {
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
        rows = LAYOUTS[self.batching](samples, self.dataset.lengths(samples), self.max_seq_length, at_once)
        places = -(-len(rows) // at_once) * plan.ranks
        share, more = divmod(len(rows), places)
        starts = [place * share + min(place, more) for place in range(places + 1)]
        dealt = [rows[start:end] for start, end in pairwise(starts)]
        return [dealt[first : first + plan.ranks] for first in range(0, places, plan.ranks)]

    def filling(self) -> Filling:
        """How full the rows of the first steps are: those of the first ``FILLING_SAMPLES`` samples, at least one."""
        plan = self.plan
        steps = range(plan.start_step + 1, plan.total_steps + 1)[: max(1, FILLING_SAMPLES // plan.step_samples)]
        tokens = cells = samples = rows = 0
        for step in steps:
            for micro_batch in self.micro_batches(step):
                for of_rank in micro_batch:
                    filled = [int(self.dataset.lengths(np.array(row)).sum()) for row in of_rank]
                    tokens += sum(filled)
                    cells += max(filled, default=0) * len(filled)
                    samples += sum(map(len, of_rank))
                    rows += len(of_rank)
        return Filling(tokens / max(1, cells), samples / max(1, rows), tokens / max(1, rows), len(steps))
