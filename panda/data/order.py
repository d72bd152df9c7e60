"""Which sample comes when: arithmetic on (seed, epoch, global position), and no state.

A run is a line of global positions 0, 1, 2, ... An epoch is a stretch of it, in an order of its own.
Nothing depends on the number of ranks, workers or micro batches, so resuming needs only the position
of the next sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROUNDS = 6
_64_BITS = (1 << 64) - 1


@dataclass(frozen=True)
class Source:
    """One of the data sets that a run draws from."""

    samples: int
    per_epoch: int
    """Its samples in an epoch: as many as it has, or more or fewer where sources are mixed."""
    name: str = ""


class SampleOrder:
    """The order that a seed gives: each epoch visits the samples of one source, or of several, shuffled together.

    Where a source does not give an epoch exactly its number of samples, the next epoch continues where it
    stopped: no sample comes again before all have come.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self.sources = tuple(sources)
        self.seed = seed
        self.epoch_samples = sum(source.per_epoch for source in sources)

    def samples(self, positions: range) -> np.ndarray:
        """int64: the number of the sample, counted over all sources, at each of the consecutive ``positions``."""
        parts = []
        start = positions.start
        while start < positions.stop:
            epoch, first = divmod(start, self.epoch_samples)
            count = min(positions.stop - start, self.epoch_samples - first)
            slots = np.arange(first, first + count, dtype=np.int64)
            parts.append(self._in_epoch(epoch, permute(slots, self.epoch_samples, key_of(self.seed, epoch))))
            start += count
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _in_epoch(self, epoch: int, slots: np.ndarray) -> np.ndarray:
        """The samples of the ``slots`` of an epoch: each source has a range of slots."""
        found = np.empty_like(slots)
        first_slot = first_sample = 0
        for number, source in enumerate(self.sources):
            mine = (slots >= first_slot) & (slots < first_slot + source.per_epoch)
            drawn = slots[mine] - first_slot
            if source.per_epoch % source.samples == 0:
                drawn %= source.samples
            else:  # the seed decides which part of the source comes first, too
                passes, drawn = np.divmod(drawn + epoch * source.per_epoch, source.samples)
                for each in np.unique(passes):
                    key = key_of(self.seed, int(each), number + 1)
                    drawn[passes == each] = permute(drawn[passes == each], source.samples, key)
            found[mine] = drawn + first_sample
            first_slot += source.per_epoch
            first_sample += source.samples
        return found


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """The images of ``indices``, int64, under a permutation of ``range(size)`` that ``key`` picks.

    A Feistel network permutes the next even power of two, whatever its round function, and applying
    it again until the value falls inside the range restricts it to ``size`` (cycle walking; Black
    and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). No table is needed, however large the
    set.
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    keys = [np.uint64(_mix(key + round_number)) for round_number in range(_ROUNDS)]
    images = indices.astype(np.uint64)
    outside = np.arange(len(images))
    while len(outside):
        left, right = images[outside] >> half_bits, images[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix_all(right ^ round_key) & mask)
        images[outside] = left << half_bits | right
        outside = outside[images[outside] >= size]
    return images.astype(np.int64)


def key_of(seed: int, epoch: int, source: int = 0) -> int:
    """The key of a permutation: another one for each seed, epoch and source."""
    key = _mix(_mix(seed) ^ epoch)
    return _mix(key ^ source << 32) if source else key


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): 64 bits, each depending on all."""
    value = value + 0x9E3779B97F4A7C15 & _64_BITS
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _64_BITS
    return value ^ value >> 31


def _mix_all(values: np.ndarray) -> np.ndarray:
    """The same of each of ``values``, uint64: arithmetic modulo 2 to the 64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ values >> np.uint64(31)
    return mixed


@dataclass(frozen=True)
class BatchPlan:
    """How the line of positions is cut into optimizer steps.

    Steps ignore the borders of epochs; only the last step of a run can be short.
    """

    samples: int
    """Samples of an epoch."""
    micro_batch: int
    """Rows of a micro batch."""
    accumulation: int
    """Micro batches of a step on each rank, where each row is one sample."""
    ranks: int
    """Data-parallel ranks."""
    epochs: float
    max_steps: int = -1
    """The number of steps; -1 for as many as ``epochs`` takes."""
    start_step: int = 0
    """Optimizer steps that are done already; the next one begins at ``start_position``."""
    start_position: int = 0

    @property
    def step_samples(self) -> int:
        """Samples of a full optimizer step."""
        return self.micro_batch * self.accumulation * self.ranks

    @property
    def first_samples(self) -> int:
        """Samples of the next step: all that are left where those are fewer than a full one's."""
        return max(0, min(self.step_samples, self.end_position - self.start_position))

    @property
    def end_position(self) -> int:
        """The position after the last sample of the run."""
        if self.max_steps > 0:
            return self.start_position + (self.max_steps - self.start_step) * self.step_samples
        return max(1, round(self.epochs * self.samples))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, those before ``start_step`` included."""
        remaining = self.end_position - self.start_position
        return self.start_step + max(0, math.ceil(remaining / self.step_samples))

    def step_end(self, step: int) -> int:
        """The position after the last sample of optimizer step ``step``, counted from 1."""
        return min(self.end_position, self.start_position + (step - self.start_step) * self.step_samples)

    def positions(self, step: int) -> range:
        """Global positions of the samples of optimizer step ``step``."""
        return range(self.step_end(step - 1), self.step_end(step))
