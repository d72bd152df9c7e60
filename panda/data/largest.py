"""The largest micro batch of a run, found before its first step by the lengths of its samples.

Only the lengths of all samples are looked at, in arrays: it takes a third of a second for a million samples. The few
steps that promise most are then laid out in rows as in the run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from panda.data.packing import Layout
from panda.data.token_dataset import SampleSet

AT_ONCE = 1 << 20
"""Samples whose lengths are looked at together."""
LAID_OUT = 16
"""Steps that are laid out: those that promise the largest micro batches."""


@dataclass(frozen=True)
class LargestMicroBatch:
    """The micro batch with the most cells, rows times their padded length, and where it comes."""

    step: int
    number: int
    """Of the micro batches of its step on a rank, counted from 0."""
    rank: int
    rows: int
    tokens: int
    """Of each row, with padding."""

    @property
    def cells(self) -> int:
        return self.rows * self.tokens

    def __str__(self) -> str:
        return f"{self.rows:,} x {self.tokens:,} tokens"


def largest_to_come(layout: Layout) -> LargestMicroBatch | None:
    """The largest micro batch of the steps that ``layout`` still has; None where the next step has one as large.

    It is exact where a row is one sample. Of packed rows, whose length follows from all samples of a step, it may be a
    few percent smaller than the largest of the run. Among equally large ones it prefers one that is not the first of
    its step: gradients are kept then.
    """
    plan = layout.plan
    first = plan.start_step + 1
    if first >= plan.total_steps:
        return None
    now = _largest_of(layout, first)
    most = layout.max_seq_length if layout.packed else _longest_sample(layout.dataset)
    if now.cells >= plan.micro_batch * _padded(layout, most):
        return None
    promised = _promised(layout, first + 1, most)
    candidates = first + 1 + np.argsort(-promised, kind="stable")[:LAID_OUT]
    found = [_largest_of(layout, int(step)) for step in candidates]
    largest = max(found, key=lambda each: (each.cells, each.number > 0, -each.step))
    return largest if largest.cells > now.cells else None


def _largest_of(layout: Layout, step: int) -> LargestMicroBatch:
    """The largest micro batch of ``step``; among equal ones one that is not the first."""
    found = []
    for number, of_ranks in enumerate(layout.micro_batches(step)):
        for rank, rows in enumerate(of_ranks):
            longest = max(layout.filled_of(rows), default=0)
            found.append(LargestMicroBatch(step, number, rank, len(rows), _padded(layout, longest)))
    return max(found, key=lambda each: (each.cells, each.number > 0))


def _padded(layout: Layout, tokens: int) -> int:
    """The length of rows whose longest has ``tokens``. A sample of several sequences may have more than a row."""
    return max(tokens, layout.row_length(tokens))


def _longest_sample(dataset: SampleSet) -> int:
    parts = (np.arange(start, min(start + AT_ONCE, len(dataset))) for start in range(0, len(dataset), AT_ONCE))
    return max(int(dataset.lengths(part).max()) for part in parts)


def _promised(layout: Layout, first: int, most: int) -> np.ndarray:
    """int64: about how many cells the largest micro batch of each step has, from step ``first`` on.

    The steps after enough of them with full rows of ``most`` tokens are left out.
    """
    plan, found = layout.plan, []
    steps = max(1, AT_ONCE // plan.step_samples)
    for start in range(first, plan.total_steps + 1, steps):
        ends = np.array([plan.step_end(step) for step in range(start - 1, min(start + steps, plan.total_steps + 1))])
        lengths = layout.dataset.lengths(layout.order.samples(range(int(ends[0]), int(ends[-1]))))
        longest = np.maximum.reduceat(lengths, ends[:-1] - ends[0])
        rows = np.minimum(np.diff(ends), plan.micro_batch)
        if layout.packed:
            tokens, at_once = np.add.reduceat(lengths, ends[:-1] - ends[0]), plan.micro_batch * plan.ranks
            micro_batches = -(-tokens // (layout.max_seq_length * at_once)) * plan.ranks
            longest = np.maximum(longest, -(-tokens // (micro_batches * plan.micro_batch)))
            rows = np.minimum(rows, -(-tokens // (longest * micro_batches)))
        found.append(rows * longest)
        if np.count_nonzero(np.concatenate(found) >= plan.micro_batch * most) >= LAID_OUT:
            break
    return np.concatenate(found)
