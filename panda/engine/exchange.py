"""Whole parameters from the ranks' parts of them, each on one rank, and back.

Each parameter has an owner, one of all ranks, so that the work is done once and spread evenly. Both ways are one
``all_to_all``: with n elements in all, a rank sends and receives about n / ranks under ZeRO. Without ZeRO every data
rank has all of a parameter: nothing is sent to the owner, and each rank receives n.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from panda.engine.processes import Processes
from panda.registry.contexts import ParameterDescription
from panda.registry.contexts import TensorLayout

Segments = tuple[tuple[str, int, int, int], ...]
"""Of a tensor of a rank: the parameter, the first element in the tensor, the length, the first in the parameter."""


class _Piece(NamedTuple):
    """A stretch of a parameter that goes from one rank to another."""

    name: str
    tensor: int
    """The place of its tensor among those of the call."""
    start: int
    length: int
    source: int
    """The first element in the part of the parameter that this tensor-parallel rank has."""


@dataclass(frozen=True)
class _Plan:
    """What this rank sends and receives."""

    owned: tuple[str, ...]
    given: tuple[tuple[_Piece, ...], ...]
    """By owner: what this rank has of the parameters that it collects."""
    collected: tuple[tuple[_Piece, ...], ...]
    """By rank: what this one collects, as an owner."""
    returned: tuple[tuple[_Piece, ...], ...]
    """By owner: what this rank gets back."""
    handed: tuple[tuple[_Piece, ...], ...]
    """By rank: what this one hands out, as an owner."""


class RankExchange:
    """Collectives over all ranks: each has to call them with the same tensors and names, in the same order."""

    def __init__(
        self,
        tensors: Sequence[TensorLayout],
        described: Mapping[str, ParameterDescription],
        everyone: Sequence[Sequence[Segments]],
        processes: Processes,
        *,
        partitioned: bool,
    ) -> None:
        """``everyone``: by rank, the segments of each of its tensors."""
        self._numbers = {layout: number for number, layout in enumerate(tensors)}
        self._described, self._everyone = described, everyone
        self._processes, self._partitioned = processes, partitioned
        self._collective = dist.all_to_all_single
        self._plans: dict[tuple[tuple[int, ...], tuple[str, ...]], _Plan] = {}

    def gather(
        self, layouts: Sequence[TensorLayout], values: Sequence[torch.Tensor], names: Collection[str] | None
    ) -> dict[str, torch.Tensor]:
        """See ``ParameterLayout.gather``."""
        plan = self._plan(layouts, names)
        flat = [value.detach().reshape(-1) for value in values]
        received = self._all_to_all(
            [flat[piece.tensor].narrow(0, piece.start, piece.length) for pieces in plan.given for piece in pieces],
            [sum(piece.length for piece in pieces) for pieces in plan.given],
            [sum(piece.length for piece in pieces) for pieces in plan.collected],
            flat[0].dtype,
        )
        parts = {name: self._empty_parts(name, received) for name in plan.owned}
        at = 0
        for rank, pieces in enumerate(plan.collected):
            for piece in pieces:
                part = parts[piece.name][self._part_of(rank, piece.name)]
                part[piece.source : piece.source + piece.length] = received[at : at + piece.length]
                at += piece.length
        return {name: self._joined(name, parts[name]) for name in plan.owned}

    def scatter(
        self,
        layouts: Sequence[TensorLayout],
        wholes: Mapping[str, torch.Tensor],
        names: Collection[str] | None,
        dtype: torch.dtype | None,
    ) -> list[torch.Tensor]:
        """See ``ParameterLayout.scatter``."""
        dtype = dtype or torch.float32
        plan = self._plan(layouts, names)
        parts = {name: self._parts(name, wholes[name].to(dtype)) for name in plan.owned}
        received = self._all_to_all(
            [
                parts[piece.name][self._part_of(rank, piece.name)].narrow(0, piece.source, piece.length)
                for rank, pieces in enumerate(plan.handed)
                for piece in pieces
            ],
            [sum(piece.length for piece in pieces) for pieces in plan.handed],
            [sum(piece.length for piece in pieces) for pieces in plan.returned],
            dtype,
        )
        results = [torch.zeros(layout.tensor.numel(), dtype=dtype, device=received.device) for layout in layouts]
        at = 0
        for pieces in plan.returned:
            for piece in pieces:
                results[piece.tensor][piece.start : piece.start + piece.length] = received[at : at + piece.length]
                at += piece.length
        return [
            result.view(layout.tensor.shape).to(layout.tensor.device)
            for result, layout in zip(results, layouts, strict=True)
        ]

    # -- what goes where

    def _plan(self, layouts: Sequence[TensorLayout], names: Collection[str] | None) -> _Plan:
        tensors = tuple(self._numbers[layout] for layout in layouts)
        moved = tuple(name for layout in layouts for name in layout.parameters if names is None or name in names)
        if (tensors, moved) not in self._plans:
            self._plans[tensors, moved] = self._planned(tensors, moved)
        return self._plans[tensors, moved]

    def _planned(self, tensors: tuple[int, ...], names: tuple[str, ...]) -> _Plan:
        owners, here = self._owners(names), self._processes.rank
        ranks = range(self._processes.world_size)
        held = [list(self._held(rank, tensors, owners)) for rank in ranks]

        def given(rank: int, owner: int) -> tuple[_Piece, ...]:
            return tuple(p for p in held[rank] if owners[p.name] == owner and self._gives(rank, owner, p.name))

        def wanted(rank: int, owner: int) -> tuple[_Piece, ...]:
            return tuple(piece for piece in held[rank] if owners[piece.name] == owner)

        return _Plan(
            tuple(name for name in names if owners[name] == here),
            tuple(given(here, owner) for owner in ranks),
            tuple(given(rank, here) for rank in ranks),
            tuple(wanted(here, owner) for owner in ranks),
            tuple(wanted(rank, here) for rank in ranks),
        )

    def _held(self, rank: int, tensors: tuple[int, ...], owners: Mapping[str, int]) -> Iterator[_Piece]:
        for place, number in enumerate(tensors):
            for name, start, length, source in self._everyone[rank][number]:
                if name in owners:
                    yield _Piece(name, place, start, length, source)

    def _gives(self, rank: int, owner: int, name: str) -> bool:
        """Whether ``owner`` collects what ``rank`` has of the parameter, and not what another has of the same."""
        size = self._processes.tensor_ranks
        return (self._is_split(name) or rank % size == owner % size) and (
            self._partitioned or rank // size == owner // size
        )

    def _owners(self, names: tuple[str, ...]) -> dict[str, int]:
        """An owner for each: the largest first, to the rank with the least work, which grows as of a product of it."""
        load = [0] * self._processes.world_size
        owners = {}
        for name in sorted(names, key=self._work, reverse=True):
            owner = load.index(min(load))
            load[owner] += self._work(name)
            owners[name] = owner
        return owners

    def _work(self, name: str) -> int:
        shape = self._described[name].shape
        work = min(shape[-2:], default=1)
        for size in shape:
            work *= size
        return work

    # -- a parameter and its parts

    def _is_split(self, name: str) -> bool:
        return self._described[name].split is not None

    def _part_of(self, rank: int, name: str) -> int:
        return rank % self._processes.tensor_ranks if self._is_split(name) else 0

    def _part_shape(self, name: str) -> tuple[int, ...]:
        described = self._described[name]
        size = self._processes.tensor_ranks
        return tuple(n // size if at == described.split else n for at, n in enumerate(described.shape))

    def _empty_parts(self, name: str, like: torch.Tensor) -> list[torch.Tensor]:
        elements = 1
        for size in self._part_shape(name):
            elements *= size
        return [like.new_empty(elements) for _ in range(self._processes.tensor_ranks if self._is_split(name) else 1)]

    def _joined(self, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
        shaped = [part.view(self._part_shape(name)) for part in parts]
        split = self._described[name].split
        return shaped[0] if split is None else torch.cat(shaped, split)

    def _parts(self, name: str, whole: torch.Tensor) -> list[torch.Tensor]:
        split = self._described[name].split
        parts = [whole] if split is None else whole.chunk(self._processes.tensor_ranks, split)
        return [part.to(self._processes.device).reshape(-1) for part in parts]

    # -- the collective

    def _all_to_all(
        self, pieces: list[torch.Tensor], sent: list[int], received: list[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """What the ranks sent to this one, one after the other. Under optimizer offload it still goes over the GPU."""
        device = self._processes.device
        sending = torch.cat(pieces) if pieces else torch.empty(0, dtype=dtype)
        sending = sending.to(device)
        if self._processes.world_size == 1:
            return sending
        receiving = torch.empty(sum(received), dtype=dtype, device=device)
        self._collective(receiving, sending, received, sent)
        return receiving
