"""Micro batches: rows of a layout as tensors, prepared ahead of the device."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset

from panda.data.packing import Layout
from panda.data.packing import RowLength
from panda.data.packing import exact_length
from panda.registry import UserError
from panda.registry.contexts import IGNORED_LABEL


@dataclass(frozen=True)
class Batch:
    """One micro batch."""

    cells: torch.Tensor
    """int64 [2 or 3, rows, length], the input ids, the labels and, where rows hold several samples, the positions:
    one tensor, for one copy to the device."""
    lengths: tuple[int, ...]
    """Tokens of each row that are not padding, which follows them."""
    supervised_tokens: int
    """Tokens that carry loss."""
    bounds: torch.Tensor | None = None
    """int32 [samples + 1], where asked for: the first token of each sample, counted over all rows, and the end. The
    padding of a row is a sample. Empty samples at the end make their number a power of two."""
    longest: int = 0
    """With ``bounds``: no sample has more tokens; a power of two."""

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(self.lengths)

    @property
    def real(self) -> torch.Tensor:
        """bool [rows, length]: which tokens are not padding."""
        lengths = torch.tensor(self.lengths).to(self.cells.device, non_blocking=True)
        return torch.arange(self.cells.shape[2], device=self.cells.device) < lengths.unsqueeze(1)

    @property
    def input_ids(self) -> torch.Tensor:
        """int64 [rows, length], padded on the right: a causal model cannot see the padding."""
        return self.cells[0]

    @property
    def labels(self) -> torch.Tensor:
        """int64 [rows, length], the token at the same place, or IGNORED_LABEL."""
        return self.cells[1]

    @property
    def positions(self) -> dict[str, Any]:
        """What the model is called with besides ``input_ids``.

        Where rows hold several samples: ``position_ids``, int64 [rows, length], from 0 on in each sample, by which a
        model tells them apart. For a model that wants them, ``sample_bounds`` and ``longest_sample`` say where samples
        begin, too: ``bounds`` and ``longest``.
        """
        if len(self.cells) == 2:
            return {}
        bounded = {} if self.bounds is None else {"sample_bounds": self.bounds, "longest_sample": self.longest}
        return {"position_ids": self.cells[2], **bounded}

    def to(self, device: torch.device) -> Batch:
        bounds = None if self.bounds is None else self.bounds.to(device, non_blocking=True)
        return replace(self, cells=self.cells.to(device, non_blocking=True), bounds=bounds)

    def pin_memory(self) -> Batch:
        bounds = None if self.bounds is None else self.bounds.pin_memory()
        return replace(self, cells=self.cells.pin_memory(), bounds=bounds)

    def __reduce__(self) -> tuple[Any, ...]:
        """Through the pipe from a worker as an array of half the size. torch would pass a tensor as a file of shared
        memory, which for one as small as this takes longer than copying it, and halves the rate of a loader
        (measured: bench/data.py)."""
        bounds = None if self.bounds is None else self.bounds.numpy()
        cells = self.cells.numpy().astype(np.int32)
        return _unpickled, (cells, self.lengths, self.supervised_tokens, bounds, self.longest)


def _unpickled(
    cells: np.ndarray, lengths: tuple[int, ...], supervised_tokens: int, bounds: np.ndarray | None, longest: int
) -> Batch:
    on_host = None if bounds is None else torch.from_numpy(bounds)
    return Batch(torch.from_numpy(cells.astype(np.int64)), lengths, supervised_tokens, on_host, longest)


def collate(
    rows: Sequence[Sequence[tuple[Any, Any]]],
    pad_token_id: int,
    *,
    packed: bool = False,
    bounded: bool = False,
    row_length: RowLength = exact_length,
) -> Batch:
    """One batch of ``rows``, which are lists of samples (token ids, supervision), padded to the longest.

    Where there are no rows, a batch of one row without loss. With ``packed``, positions start at 0 again in
    each sample, and in the padding, which makes it a sample of its own; with ``bounded``, too, the batch says where
    samples begin. ``row_length`` turns the tokens of the longest row into the length of all.
    """
    lengths = [sum(len(token_ids) for token_ids, _ in row) for row in rows]
    # In numpy, which copies a hundred numbers in a tenth of the time that torch takes.
    cells = np.empty((3, max(1, len(rows)), row_length(max(lengths, default=2))), dtype=np.int64)
    input_ids, labels, positions = cells
    from_0 = np.arange(cells.shape[2])
    input_ids[:], labels[:], positions[:] = pad_token_id, IGNORED_LABEL, from_0
    supervised_tokens = 0
    for number, row in enumerate(rows):
        start = 0
        for token_ids, supervised in row:
            end = start + len(token_ids)
            input_ids[number, start:end] = token_ids
            np.copyto(labels[number, start:end], token_ids, where=supervised)
            positions[number, start:end] = from_0[: end - start]
            supervised_tokens += int(np.count_nonzero(supervised))
            start = end
        positions[number, start:] = from_0[: len(from_0) - start]
    bounds, longest = _bounds(positions) if packed and bounded else (None, 0)
    cells = cells if packed else cells[:2]
    return Batch(torch.from_numpy(cells), tuple(lengths) or (0,), supervised_tokens, bounds, longest)


def _bounds(positions: np.ndarray) -> tuple[torch.Tensor, int]:
    """``Batch.bounds`` and ``Batch.longest`` of rows with ``positions``.

    Powers of two, because code that is compiled for a number of samples, and a largest one, then serves most batches.
    """
    starts = np.flatnonzero(positions == 0)
    longest = int(np.diff(starts, append=positions.size).max())
    bounds = np.full(_power_of_two(len(starts)) + 1, positions.size, dtype=np.int32)
    bounds[: len(starts)] = starts
    return torch.from_numpy(bounds), _power_of_two(longest)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()


class _Steps(Dataset[list[Batch]]):
    """The micro batches of a rank by optimizer step, made in the worker that is asked for one: its samples, their rows
    and the tensors. The training process sends only a number, and receives one message a step."""

    def __init__(self, layout: Layout, rank: int, pad_token_id: int, positions: bool, bounds: bool) -> None:
        self.layout, self.rank, self.pad_token_id = layout, rank, pad_token_id
        self.packed, self.bounded = layout.packed or positions, bounds

    def __getitem__(self, step: int) -> list[Batch]:
        dataset = self.layout.dataset
        return [
            collate(
                [[dataset[s] for s in row] for row in of_ranks[self.rank]],
                self.pad_token_id,
                packed=self.packed,
                bounded=self.bounded,
                row_length=self.layout.row_length,
            )
            for of_ranks in self.layout.micro_batches(step)
        ]


def step_batches(
    layout: Layout,
    *,
    rank: int,
    pad_token_id: int,
    num_workers: int,
    prefetch_factor: int,
    pin_memory: bool,
    positions: bool = False,
    bounds: bool = False,
) -> Iterator[list[Batch]]:
    """The micro batches of this rank, a list an optimizer step, from the plan's ``start_step`` to its end.

    With ``positions`` they have positions even where a row is one sample; with ``bounds``, those that have positions
    also say where samples begin.
    """
    plan = layout.plan
    loader = DataLoader(
        _Steps(layout, rank, pad_token_id, positions, bounds),
        batch_size=None,
        sampler=range(plan.start_step + 1, plan.total_steps + 1),
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory,
        # A generator of its own, since the loader draws a seed for its workers: the run's random numbers
        # must not depend on how often a loader is started.
        generator=torch.Generator().manual_seed(0),
    )
    batches = iter(loader)
    try:
        yield from batches
    except RuntimeError as problem:
        if "exited unexpectedly" not in str(problem):
            raise
        raise UserError(
            f"num_workers: a process that prepares batches was killed from outside ({problem}), most likely since"
            " memory ran out. Lower num_workers or prefetch_factor."
        ) from problem
    finally:
        # Not left to the garbage collector: an exception from a worker keeps the iterator in a reference cycle,
        # and when it is collected there its workers are not told to end, and it waits five seconds for each.
        getattr(batches, "_shutdown_workers", lambda: None)()
