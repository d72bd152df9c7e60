"""A part of a data set: at most so many samples of each of its sources, less those that are held out, or these."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from panda.data.order import Source
from panda.data.order import key_of
from panda.data.order import permute
from panda.data.report import DataReport
from panda.data.token_dataset import Sample
from panda.data.token_dataset import SampleSet
from panda.files.terminal import number_of
from panda.registry import UserError

AT_ONCE = 1 << 20
"""Samples that are looked at together."""
SPLIT = 1 << 20
"""Stands for an epoch in the keys of permutations: beyond those of any run, so that no order of a run is this one."""


def trained_and_held_out(
    dataset: SampleSet, *, max_samples: int | None, eval_fraction: float, seed: int
) -> tuple[SampleSet, SampleSet | None]:
    """What a run trains on and what it evaluates on, of the samples of ``dataset``; None for nothing to evaluate on.

    Of each source, the first ``max_samples`` are used, and of these the rounded ``eval_fraction`` is held out: which
    ones is arithmetic on the seed and the number of a sample. Raises UserError where none would be.
    """
    if max_samples is None and not eval_fraction:
        return dataset, None
    used = [min(source.samples, max_samples or source.samples) for source in dataset.sources]
    held = [max(0, min(count - 1, round(eval_fraction * count))) for count in used]
    if eval_fraction and not any(held):
        raise UserError(
            f"eval_fraction: {eval_fraction:g} of {number_of(sum(used), 'sample')} is less than one. Write a larger"
            " fraction, or name data to evaluate on with `eval_data_dir`."
        )
    key = seed if eval_fraction else None
    trained = Selection(dataset, [range(h, u) for h, u in zip(held, used, strict=True)], used, key)
    notes = []
    if any(count < source.samples for count, source in zip(used, dataset.sources, strict=True)):
        notes.append(f"max_samples: {_of(sum(used), len(dataset))} used, the first of each data set")
    if eval_fraction:
        notes.append(f"eval_fraction: {_of(sum(held), sum(used))} held out, and not trained on")
    trained.report = replace(dataset.report, notes=[*dataset.report.notes, *notes], samples=len(dataset))
    return trained, Selection(dataset, [range(h) for h in held], used, key) if eval_fraction else None


def _of(some: int, every: int) -> str:
    return f"{some:,} of {number_of(every, 'sample')} {'is' if some == 1 else 'are'}"


class Selection:
    """Samples of a data set: of each of its sources, a range of the places in a permutation of the first ones.

    A permutation, and no list of samples: nothing here grows with the data.
    """

    def __init__(self, dataset: SampleSet, places: Sequence[range], used: Sequence[int], seed: int | None) -> None:
        """``used``: how many samples of each source are permuted; not at all where ``seed`` is None."""
        self.dataset = dataset
        self.report = DataReport()
        self._places, self._used, self._seed = places, used, seed
        self._starts = np.cumsum([0, *(source.samples for source in dataset.sources)])[:-1]
        self._ends = np.cumsum([len(each) for each in places])
        self.sources = tuple(
            Source(len(each), max(1, round(source.per_epoch * len(each) / source.samples)), source.name)
            for source, each in zip(dataset.sources, places, strict=True)
            if each
        )
        described = [dataset.fingerprint, [(each.start, each.stop) for each in places], list(used), seed]
        self.fingerprint = hashlib.sha256(repr(described).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[int(self.numbers(np.array([index]))[0])]

    def place(self, index: int) -> tuple[Path, int] | None:
        """The file and the row, counted from 1, of which sample ``index`` is made; None where that is not known."""
        find = getattr(self.dataset, "place", None)
        found: tuple[Path, int] | None = find(int(self.numbers(np.array([index]))[0])) if find is not None else None
        return found

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return self.dataset.lengths(self.numbers(indices))

    def numbers(self, indices: np.ndarray) -> np.ndarray:
        """int64: the numbers in the whole data set of the samples ``indices``."""
        found = np.empty(len(indices), dtype=np.int64)
        first = 0
        for source, end in enumerate(self._ends.tolist()):
            mine = (indices >= first) & (indices < end)
            places = indices[mine] - first + self._places[source].start
            found[mine] = self._starts[source] + self._at(source, places)
            first = end
        return found

    def _at(self, source: int, places: np.ndarray) -> np.ndarray:
        """The samples at ``places`` of the permutation of a source, counted in the source."""
        if self._seed is None:
            return places
        return permute(places, self._used[source], key_of(self._seed, SPLIT, source + 1))

    @cached_property
    def sample_hashes(self) -> np.ndarray:
        """uint64 [samples]. Raises AttributeError where the data set has none."""
        stored: np.ndarray = self.dataset.sample_hashes  # type: ignore[attr-defined]
        return np.concatenate([stored[some] for some in self._numbers()])

    @cached_property
    def tokens(self) -> int:
        return sum(int(self.dataset.lengths(some).sum()) for some in self._numbers())

    @cached_property
    def supervised_tokens(self) -> int:
        """Counted over the smaller side: these samples, or the others."""
        if 2 * len(self) <= len(self.dataset):
            return self._supervised(self._numbers())
        kept = np.zeros(len(self.dataset), dtype=bool)
        for some in self._numbers():
            kept[some] = True
        return self.dataset.supervised_tokens - self._supervised([np.flatnonzero(~kept)])

    def _supervised(self, numbers: Iterator[np.ndarray] | Sequence[np.ndarray]) -> int:
        return sum(
            int(np.count_nonzero(values))
            for some in numbers
            for number in some.tolist()
            for values in self.dataset[number].values()
            if values.dtype == np.bool_  # as only supervision is
        )

    def _numbers(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), AT_ONCE):
            yield self.numbers(np.arange(start, min(start + AT_ONCE, len(self))))
