"""Micro batches: rows of a layout as tensors, prepared ahead of the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset

from panda.data.layouts import Layout
from panda.data.layouts import Row
from panda.data.token_dataset import SampleSet
from panda.registry import UserError

IGNORED_LABEL = -100
"""Label of a token that carries no loss."""


@dataclass(frozen=True)
class Batch:
    """One micro batch."""

    input_ids: torch.Tensor
    """int64 [rows, length], padded on the right: a causal model cannot see the padding."""
    labels: torch.Tensor
    """int64 [rows, length], the token at the same place, or IGNORED_LABEL."""
    tokens: int
    """Tokens that are not padding."""
    supervised_tokens: int
    """Tokens that carry loss."""
    position_ids: torch.Tensor | None = None
    """int64 [rows, length] where rows hold several samples: from 0 on in each, by which a model tells them apart."""

    @property
    def positions(self) -> dict[str, torch.Tensor]:
        """What the model is called with beside ``input_ids``."""
        return {} if self.position_ids is None else {"position_ids": self.position_ids}

    def to(self, device: torch.device) -> Batch:
        return replace(self, **{name: t.to(device, non_blocking=True) for name, t in self._tensors().items()})

    def pin_memory(self) -> Batch:
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def __reduce__(self) -> tuple[Any, ...]:
        """As arrays, through the pipe from a worker. torch passes each tensor as a file of shared memory, which takes
        longer than to copy one that is as small: half of the rate of a loader, measured (bench/data.py)."""
        arrays = {name: tensor.numpy() for name, tensor in self._tensors().items()}
        return _with_tensors, ({**vars(self), **dict.fromkeys(arrays)}, arrays)

    def _tensors(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


def _with_tensors(values: dict[str, Any], arrays: dict[str, Any]) -> Batch:
    return Batch(**values | {name: torch.from_numpy(array) for name, array in arrays.items()})


def collate(rows: Sequence[Sequence[tuple[Any, Any]]], pad_token_id: int, *, packed: bool = False) -> Batch:
    """Lay ``rows``, each of samples of (token ids, supervision), side by side and pad them to the longest.

    No rows make one without loss. With ``packed``, positions begin anew in each sample, and in the
    padding, which so is a sample of its own.
    """
    lengths = [sum(len(token_ids) for token_ids, _ in row) for row in rows]
    shape = max(1, len(rows)), max(lengths, default=2)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED_LABEL, dtype=torch.int64)
    position_ids = torch.arange(shape[1]).repeat(shape[0], 1) if packed else None
    supervised_tokens = 0
    for number, row in enumerate(rows):
        start = 0
        for token_ids, supervised in row:
            end = start + len(token_ids)
            ids = torch.tensor(token_ids, dtype=torch.int64)
            input_ids[number, start:end] = ids
            labels[number, start:end] = ids.masked_fill(~torch.tensor(supervised), IGNORED_LABEL)
            if position_ids is not None:
                position_ids[number, end:] = torch.arange(shape[1] - end)
            supervised_tokens += int(supervised.sum())
            start = end
    return Batch(input_ids, labels, sum(lengths), supervised_tokens, position_ids)


class _MicroBatches(Dataset[Batch]):
    """The micro batch of given rows, made on demand in whichever worker is asked."""

    def __init__(self, dataset: SampleSet, pad_token_id: int, packed: bool) -> None:
        self.dataset, self.pad_token_id, self.packed = dataset, pad_token_id, packed

    def __getitem__(self, rows: list[Row]) -> Batch:
        samples = [[self.dataset[sample] for sample in row] for row in rows]
        return collate(samples, self.pad_token_id, packed=self.packed)


def step_batches(
    layout: Layout,
    *,
    rank: int,
    pad_token_id: int,
    num_workers: int,
    prefetch_factor: int,
    pin_memory: bool,
) -> Iterator[list[Batch]]:
    """The micro batches of this rank, a list an optimizer step, from the plan's ``start_step`` to its end."""
    plan = layout.plan
    steps = range(plan.start_step + 1, plan.total_steps + 1)
    keys = _Keys(layout, rank, steps)
    loader = DataLoader(
        _MicroBatches(layout.dataset, pad_token_id, layout.packed),
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory,
        # A generator of its own: the loader draws a seed for its workers, and the run's random
        # numbers must not depend on how often it is started.
        generator=torch.Generator().manual_seed(0),
    )
    batches = iter(loader)
    try:
        for _ in steps:
            first = next(batches)
            yield [first, *(next(batches) for _ in range(keys.counts.popleft() - 1))]
    except RuntimeError as problem:
        if "exited unexpectedly" not in str(problem):
            raise
        raise UserError(
            f"num_workers: a process that prepares batches was killed from outside ({problem}), most likely since"
            " memory ran out. Lower num_workers or prefetch_factor."
        ) from problem
    finally:
        # At once: an exception from a worker keeps the iterator in a reference cycle, and where the garbage
        # collector finds it there its workers do not hear that they may go, and it waits five seconds for each.
        getattr(batches, "_shutdown_workers", lambda: None)()


class _Keys:
    """The rows of every micro batch of a rank, in order. The loader asks for them as far ahead as it prepares."""

    def __init__(self, layout: Layout, rank: int, steps: range) -> None:
        self.layout, self.rank, self.steps = layout, rank, steps
        self.counts: deque[int] = deque()
        """Micro batches of the steps that were asked for and are not yet taken."""

    def __iter__(self) -> Iterator[list[Row]]:
        for step in self.steps:
            micro_batches = self.layout.micro_batches(step)
            self.counts.append(len(micro_batches))
            for of_ranks in micro_batches:
                yield of_ranks[self.rank]
