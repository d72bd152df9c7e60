"""Micro batches: samples of a plan padded into tensors, prepared ahead of the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset

from panda.data.order import BatchPlan
from panda.data.order import sample_at
from panda.data.token_dataset import TokenDataset

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

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        return replace(self, input_ids=self.input_ids.pin_memory(), labels=self.labels.pin_memory())


def collate(samples: list[tuple[Any, Any]], pad_token_id: int) -> Batch:
    """Pad ``samples`` of (token ids, supervision) to the longest. No samples make a row without loss."""
    length = max((len(token_ids) for token_ids, _ in samples), default=2)
    rows = max(1, len(samples))
    input_ids = torch.full((rows, length), pad_token_id, dtype=torch.int64)
    labels = torch.full((rows, length), IGNORED_LABEL, dtype=torch.int64)
    for row, (token_ids, supervised) in enumerate(samples):
        ids = torch.tensor(token_ids, dtype=torch.int64)
        input_ids[row, : len(ids)] = ids
        labels[row, : len(ids)] = ids.masked_fill(~torch.tensor(supervised), IGNORED_LABEL)
    return Batch(
        input_ids,
        labels,
        tokens=sum(len(token_ids) for token_ids, _ in samples),
        supervised_tokens=sum(int(supervised.sum()) for _, supervised in samples),
    )


class _MicroBatches(Dataset[Batch]):
    """Micro batch (step, micro) of one rank, made on demand in whichever worker is asked."""

    def __init__(self, dataset: TokenDataset, plan: BatchPlan, rank: int, seed: int, pad_token_id: int) -> None:
        self.dataset, self.plan, self.rank, self.seed, self.pad_token_id = dataset, plan, rank, seed, pad_token_id

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        positions = self.plan.positions(*key, self.rank)
        samples = [self.dataset[sample_at(p, self.plan.samples, self.seed)] for p in positions]
        return collate(samples, self.pad_token_id)


def step_batches(
    dataset: TokenDataset,
    plan: BatchPlan,
    *,
    rank: int,
    seed: int,
    pad_token_id: int,
    num_workers: int,
    prefetch_factor: int,
    pin_memory: bool,
) -> Iterator[list[Batch]]:
    """The micro batches of this rank, a list an optimizer step, from ``plan.start_step`` to the end."""
    steps = range(plan.start_step + 1, plan.total_steps + 1)
    loader = DataLoader(
        _MicroBatches(dataset, plan, rank, seed, pad_token_id),
        batch_size=None,
        sampler=_Keys(plan, steps),
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory,
        # A generator of its own: the loader draws a seed for its workers, and the run's random
        # numbers must not depend on how often it is started.
        generator=torch.Generator().manual_seed(seed),
    )
    batches = iter(loader)
    try:
        for step in steps:
            yield [next(batches) for _ in range(plan.micro_batches(step))]
    finally:
        # At once: an exception from a worker keeps the iterator in a reference cycle, and where the garbage
        # collector finds it there its workers do not hear that they may go, and it waits five seconds for each.
        getattr(batches, "_shutdown_workers", lambda: None)()


class _Keys:
    """(step, micro) of every micro batch, in order."""

    def __init__(self, plan: BatchPlan, steps: range) -> None:
        self.plan, self.steps = plan, steps

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((step, micro) for step in self.steps for micro in range(self.plan.micro_batches(step)))
