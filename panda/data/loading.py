"""The micro batches of each step, made ahead of the device, in processes of their own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from panda.data.batches import Batch
from panda.data.batches import Collate
from panda.data.batches import RowShape
from panda.data.packing import Layout
from panda.data.token_dataset import Sample
from panda.data.workers import Workers
from panda.files.parent import end_with_parent


class _Steps(Dataset[list[Batch]]):
    """The micro batches of a rank by optimizer step, made in the worker that is asked for one: its samples, their rows
    and the tensors. The training process sends only a number, and receives one message a step."""

    def __init__(self, layout: Layout, rank: int, collate: Collate, shape: RowShape, workers: Workers) -> None:
        self.layout, self.rank, self.collate, self.shape, self.workers = layout, rank, collate, shape, workers

    def __getitem__(self, step: int) -> list[Batch]:
        return [self._batch(of_ranks) for of_ranks in self.layout.micro_batches(step)]

    def _batch(self, of_ranks: list[list[list[int]]]) -> Batch:
        if rows := of_ranks[self.rank]:
            return self.collate([[self._sample(number) for number in row] for row in rows], self.shape)
        # A rank without rows runs the model like the others: on the shortest sample that one has in this micro batch.
        numbers = np.array([number for rows in of_ranks for row in rows for number in row])
        shortest = int(numbers[self.layout.dataset.lengths(numbers).argmin()])
        return self.collate([[self._sample(shortest)]], self.shape).as_idle()

    def _sample(self, number: int) -> Sample:
        self.workers.reads(number)
        return {**self.layout.dataset[number], "index": np.array(number)}


def batch_of(
    layout: Layout, collate: Collate, samples: Sequence[int], *, positions: bool = False, bounds: bool = False
) -> Batch:
    """``samples`` as a batch of their own, each a row. ``positions`` and ``bounds``: as of ``step_batches``."""
    steps = _Steps(layout, 0, collate, _shape(layout, positions=positions, bounds=bounds), Workers(0))
    return collate([[steps._sample(number)] for number in samples], steps.shape)


def micro_batches_of(
    layout: Layout, collate: Collate, step: int, *, rank: int, positions: bool = False, bounds: bool = False
) -> list[Batch]:
    """The micro batches of ``rank`` in optimizer step ``step``, made here and now. The rest as of ``step_batches``."""
    return _Steps(layout, rank, collate, _shape(layout, positions=positions, bounds=bounds), Workers(0))[step]


def _shape(layout: Layout, *, positions: bool, bounds: bool) -> RowShape:
    return RowShape(layout.row_length, layout.packed or positions, bounds)


PARENT_SECONDS = 1.0
"""After how long a worker looks whether its parent is there."""


def _begin(workers: Workers, worker: int) -> None:
    """The beginning of a worker."""
    workers.begin(worker)
    _leave_signals_to(workers.parent)


def _leave_signals_to(parent: int) -> None:
    """In a worker: let only ``parent``, the training process, end it, and the end of that process.

    Ctrl-C in a terminal, and schedulers, signal all processes of a run at once, whose step is to be finished first.
    torch's workers (2.13) also watch their parent, but block for ever in handing over a batch that nobody takes. The
    system ends also one that is stopped, and so watches nothing.
    """

    def hear() -> None:
        while True:
            heard = signal.sigtimedwait({signal.SIGTERM}, PARENT_SECONDS)
            if (heard is not None and heard.si_pid == parent) or os.getppid() != parent:
                os._exit(0)

    end_with_parent(parent, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=hear, name="signals", daemon=True).start()


def step_batches(
    layout: Layout,
    collate: Collate,
    *,
    rank: int,
    num_workers: int,
    prefetch_factor: int,
    pin_memory: bool,
    positions: bool = False,
    bounds: bool = False,
) -> Iterator[list[Batch]]:
    """The micro batches of this rank, a list an optimizer step, from the plan's ``start_step`` to its end.

    ``collate`` makes each of the samples of its rows. With ``positions`` they have positions even where a row is one
    sample; with ``bounds``, those that have positions also say where samples begin.
    """
    shape = _shape(layout, positions=positions, bounds=bounds)
    plan, workers = layout.plan, Workers(num_workers)
    loader = DataLoader(
        _Steps(layout, rank, collate, shape, workers),
        batch_size=None,
        sampler=range(plan.start_step + 1, plan.total_steps + 1),
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=partial(_begin, workers),
        # A generator of its own, since the loader draws a seed for its workers: the run's random numbers
        # must not depend on how often a loader is started.
        generator=torch.Generator().manual_seed(0),
    )
    # An iterator that could not be made, since shared memory is full, would add a traceback when it is collected.
    _MultiProcessingDataLoaderIter._shutdown = True
    batches = iter(loader)
    try:
        with workers.watched(batches):
            while True:
                with workers.waited_for():
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch
    finally:
        # Not left to the garbage collector: an exception from a worker keeps the iterator in a reference cycle,
        # and when it is collected there its workers are not told to end, and it waits five seconds for each.
        getattr(batches, "_shutdown_workers", lambda: None)()
