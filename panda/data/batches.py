"""Micro batches: rows of samples as tensors."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from dataclasses import fields
from dataclasses import replace
from typing import Any
from typing import TypeVar

import numpy as np
import torch

from panda.data.packing import RowLength
from panda.data.packing import exact_length
from panda.data.token_dataset import Sample
from panda.registry.contexts import IGNORED_LABEL

AnyBatch = TypeVar("AnyBatch", bound="Batch")


@dataclass(frozen=True)
class RowShape:
    """How the layout of a run and its model want rows of tokens."""

    row_length: RowLength = exact_length
    """The tokens of the longest row of a batch to the length of all."""
    packed: bool = False
    """Whether batches have positions, which start at 0 again in each sample of a row."""
    bounded: bool = False
    """Whether those with positions also say where samples begin."""


@dataclass(frozen=True)
class Batch:
    """One micro batch: tensors by name, ``batch["label"]``."""

    arrays: Mapping[str, torch.Tensor]
    units: float
    """What its part of the loss is a sum over, as a number: the engine divides by those of the whole step."""
    tokens: int
    """Tokens that are not padding: what speeds count."""
    idle: bool = field(default=False, kw_only=True)
    """Whether it only keeps a rank without samples in step with the others: its loss and its metrics do not count."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.arrays[name]

    @property
    def real(self) -> torch.Tensor | None:
        """bool [rows, length], of a batch of tokens: which are not padding."""
        return None

    def as_idle(self: AnyBatch) -> AnyBatch:
        """The batch as one that does not count."""
        return replace(self, units=0, tokens=0, idle=True)

    def to(self: AnyBatch, device: torch.device) -> AnyBatch:
        """The batch on ``device``. The host does not wait for copies from pinned memory."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self: AnyBatch) -> AnyBatch:
        return self._each(torch.Tensor.pin_memory)

    def _each(self: AnyBatch, change: Callable[[torch.Tensor], torch.Tensor]) -> AnyBatch:
        """The batch with every tensor changed."""
        changed: dict[str, Any] = {
            each.name: change(value)
            for each in fields(self)
            if isinstance(value := getattr(self, each.name), torch.Tensor)
        }
        arrays = {name: change(tensor) for name, tensor in self.arrays.items()} if self.arrays else self.arrays
        return replace(self, arrays=arrays, **changed)

    def __reduce__(self) -> tuple[Any, ...]:
        """Through the pipe from a worker as arrays. torch would pass a tensor as a file of shared memory, which for
        one as small as this takes longer than copying it, and halves the rate of a loader (measured: bench/data.py)."""
        return _unpickled, (type(self), {each.name: _sent(getattr(self, each.name)) for each in fields(self)})


@dataclass(frozen=True)
class TokenBatch(Batch):
    """A micro batch of rows of tokens."""

    cells: torch.Tensor
    """int64 [2 or 3, rows, length], the input ids, the labels and, where rows hold several samples, the positions:
    one tensor, for one copy to the device."""
    lengths: tuple[int, ...]
    """Tokens of each row that are not padding, which follows them."""
    supervised_tokens: int
    """Tokens that carry loss."""
    weights: torch.Tensor | None = None
    """float32 [rows, length], the weight of each label in the loss; None where all count alike."""
    bounds: torch.Tensor | None = None
    """int32 [samples + 1], where asked for: the first token of each sample, counted over all rows, and the end. The
    padding of a row is a sample. Empty samples at the end make their number a power of two."""
    longest: int = 0
    """With ``bounds``: no sample has more tokens; a power of two."""

    @property
    def real(self) -> torch.Tensor:
        """bool [rows, length]: which tokens are not padding; none of an idle batch."""
        counted = [0] * len(self.lengths) if self.idle else self.lengths
        lengths = torch.tensor(counted).to(self.cells.device, non_blocking=True)
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


def _sent(value: Any) -> Any:
    """``value`` of a batch as it goes through a pipe: token ids in half their size."""
    if isinstance(value, torch.Tensor):
        array = value.numpy()
        # Token ids, labels and positions fit; other numbers of a task may not.
        return array.astype(np.int32) if value.dim() == 3 and array.dtype == np.int64 else array
    return {name: tensor.numpy() for name, tensor in value.items()} if isinstance(value, Mapping) else value


def _unpickled(kind: type[Batch], sent: dict[str, Any]) -> Batch:
    made: dict[str, Any] = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in sent.items()
    }
    if "cells" in made:
        made["cells"] = made["cells"].long()
    made["arrays"] = {name: torch.from_numpy(array) for name, array in sent["arrays"].items()}
    return kind(**made)


Sequences = Sequence[Sequence[tuple[Any, ...]]]
"""Rows, which are lists of sequences: token ids, supervision and, where given, the weight of each token, [length]."""


def token_batch(
    rows: Sequences,
    pad_token_id: int,
    shape: RowShape,
    *,
    units: float | None = None,
    arrays: Mapping[str, torch.Tensor] | None = None,
) -> TokenBatch:
    """One batch of ``rows``, padded to the longest.

    ``units``: what its part of the loss is a sum over; by default the tokens that carry loss, or the sum of their
    weights. ``arrays``: other tensors that the loss needs.

    With ``shape.packed``, positions start at 0 again in each sequence, and in the padding, which makes it one of its
    own; with ``bounded``, too, the batch says where they begin.
    """
    lengths = [sum(len(sequence[0]) for sequence in row) for row in rows]
    # In numpy, which copies a hundred numbers in a tenth of the time that torch takes.
    cells = np.empty((3, max(1, len(rows)), shape.row_length(max(lengths, default=2))), dtype=np.int64)
    input_ids, labels, positions = cells
    from_0 = np.arange(cells.shape[2])
    input_ids[:], labels[:], positions[:] = pad_token_id, IGNORED_LABEL, from_0
    weights: np.ndarray | None = None
    supervised_tokens = 0
    for number, row in enumerate(rows):
        start = 0
        for token_ids, supervised, *weighted in row:
            end = start + len(token_ids)
            input_ids[number, start:end] = token_ids
            predicted = _mask(supervised)[1:]  # nothing predicts the first
            np.copyto(labels[number, start + 1 : end], input_ids[number, start + 1 : end], where=predicted)
            positions[number, start:end] = from_0[: end - start]
            supervised_tokens += int(np.count_nonzero(predicted))
            if weighted:
                weights = np.ones(input_ids.shape, dtype=np.float32) if weights is None else weights
                weights[number, start:end] = weighted[0]
            start = end
        positions[number, start:] = from_0[: len(from_0) - start]
    if units is None:
        units = supervised_tokens if weights is None else float(weights[labels != IGNORED_LABEL].sum(dtype=np.float64))
    bounds, longest = _bounds(positions) if shape.packed and shape.bounded else (None, 0)
    cells = cells if shape.packed else cells[:2]
    return TokenBatch(
        arrays or {},
        units,
        sum(lengths),
        torch.from_numpy(cells),
        tuple(lengths) or (0,),
        supervised_tokens,
        None if weights is None else torch.from_numpy(weights),
        bounds,
        longest,
    )


def _mask(supervised: Any) -> np.ndarray:
    if isinstance(supervised, np.ndarray) and supervised.dtype == np.bool_:
        return supervised
    if isinstance(supervised, (bytes, bytearray)):
        return np.frombuffer(supervised, dtype=np.bool_)
    return np.asarray(supervised, dtype=np.bool_)


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


Collate = Callable[[list[list[Sample]], RowShape], Batch]
"""Rows of samples to a batch; there is at least one."""
