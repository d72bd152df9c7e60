"""Which sample comes when: arithmetic on (seed, epoch, global position), and no state.

A run is a line of global positions 0, 1, 2, ... Position p is in epoch ``p // samples``, and each
epoch visits every sample once, in an order of its own. Nothing depends on the number of ranks,
workers or micro batches, so the position of the next sample is all that resuming needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_ROUNDS = 6
_64_BITS = (1 << 64) - 1


def sample_at(position: int, samples: int, seed: int) -> int:
    """Index of the sample at a global position of a data set of ``samples``."""
    epoch, index = divmod(position, samples)
    return permute(index, samples, _mix(_mix(seed) ^ epoch))


def permute(index: int, size: int, key: int) -> int:
    """The image of ``index`` under a permutation of ``range(size)`` that ``key`` picks.

    A Feistel network permutes the next even power of two, whatever its round function, and applying
    it again until the value falls inside the range restricts it to ``size`` (cycle walking; Black
    and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). No table is made, however large the
    set.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_number in range(_ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(key + round_number)) & mask)
        index = left << half_bits | right
        if index < size:
            return index


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): 64 bits, each depending on all."""
    value = (value + 0x9E3779B97F4A7C15) & _64_BITS
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _64_BITS
    return value ^ value >> 31


@dataclass(frozen=True)
class BatchPlan:
    """How the line of positions is cut into optimizer steps, micro batches and ranks.

    Steps follow each other without regard to epochs; only the last step of a run can be short, and
    then every rank still has the same number of micro batches, some of them empty.
    """

    samples: int
    """Samples of the data set."""
    micro_batch: int
    """Rows of a micro batch."""
    accumulation: int
    """Micro batches of a step on each rank."""
    ranks: int
    """Data-parallel ranks."""
    epochs: float
    max_steps: int = -1
    """Exactly this many steps; -1 for as many as ``epochs`` takes."""
    start_step: int = 0
    """Optimizer steps done before; ``start_position`` is where the next one begins."""
    start_position: int = 0

    @property
    def step_samples(self) -> int:
        """Samples of a full optimizer step."""
        return self.micro_batch * self.accumulation * self.ranks

    @property
    def end_position(self) -> int:
        """The position behind the last sample of the run."""
        if self.max_steps > 0:
            return self.start_position + (self.max_steps - self.start_step) * self.step_samples
        return max(1, round(self.epochs * self.samples))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, those before ``start_step`` included."""
        remaining = self.end_position - self.start_position
        return self.start_step + max(0, math.ceil(remaining / self.step_samples))

    def step_end(self, step: int) -> int:
        """The position behind the last sample of optimizer step ``step``, counted from 1."""
        return min(self.end_position, self.start_position + (step - self.start_step) * self.step_samples)

    def micro_batches(self, step: int) -> int:
        """Micro batches that each rank has in optimizer step ``step``, counted from 1."""
        samples = self.step_end(step) - self.step_end(step - 1)
        return math.ceil(samples / (self.micro_batch * self.ranks))

    def positions(self, step: int, micro: int, rank: int) -> range:
        """Global positions of one micro batch of one rank; empty where the run's end leaves it none."""
        first = self.step_end(step - 1) + (micro * self.ranks + rank) * self.micro_batch
        end = self.step_end(step)
        return range(min(first, end), min(first + self.micro_batch, end))
