"""Samples of named arrays, each kept in one flat array."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Protocol

import numpy as np

from panda.data.fields import TEXT
from panda.data.fields import Field
from panda.data.order import Source
from panda.data.places import UNKNOWN
from panda.data.places import file_and_row
from panda.data.places import place_code
from panda.data.places import renumbered
from panda.data.reading import BadRow
from panda.data.reading import Row
from panda.data.report import DataReport

Sample = Mapping[str, np.ndarray]
"""The arrays of a sample, by name, each of one dimension."""


def sample_hash(*token_ids: Sequence[int] | np.ndarray) -> int:
    """A hash of the tokens of a sample, of 64 bits."""
    digest = hashlib.blake2b(digest_size=8)
    for tokens in token_ids:
        digest.update(np.asarray(tokens, dtype="<i4").tobytes())
    return int.from_bytes(digest.digest(), "little")


class SampleBlock:
    """The samples of some rows, and the report of those rows: what tokenising processes return."""

    def __init__(self, fields: Sequence[Field] = TEXT) -> None:
        self.fields = tuple(fields)
        self.report = DataReport()
        self.arrays: dict[str, array[Any]] = {each.name: array(each.made_in) for each in fields if not each.optional}
        """The values of all samples, one after another; an optional field is among them once a sample has it."""
        self.sizes: dict[str, array[Any]] = {each.name: array("q") for each in fields if each.along is None}
        """How many of them are of each sample."""
        self.sample_hashes = array("Q")
        self.places = array("q")
        """Of each sample, which row of which of ``files`` it is made of; see ``place_code``."""
        self.files: list[Path] = []
        self.rows: Sequence[Row] = ()
        """The rows that are being made into samples, in the order in which a task is given what they mean."""
        self._row: Row | None = None
        self._place = UNKNOWN

    def begin(self, number: int) -> None:
        """Note that the samples which are added next are made of the row ``number`` of those that the task was given,
        counted from 0. Of a task that does not say so, it is not known which rows samples are made of."""
        if self.rows:
            self._row = row = self.rows[number]
            self._place = place_code(self._number_of(row.file), row.number)

    def _number_of(self, file: Path) -> int:
        if file not in self.files[-1:]:
            if file in self.files:
                return self.files.index(file)
            self.files.append(file)
        return len(self.files) - 1

    def __len__(self) -> int:
        return len(self.sample_hashes)

    def add(self, token_ids: Sequence[int], supervised: bytes, weights: Sequence[float] | None = None) -> None:
        """Add a sample of text. ``supervised`` has a byte a token, 1 for a token to predict; the first one cannot be
        predicted: 0. ``weights``: of each token in the loss, where not all count alike.

        One without a token to predict is not added, and its row is a bad one: a tokenizer may make no tokens of an
        answer. A task that does not say which row it is has to look itself.
        """
        assert len(token_ids) == len(supervised) and supervised[0] == 0
        if 1 not in supervised:
            assert self._row is not None, "no token of a sample carries loss"
            self.report.add_bad(BadRow(self._row.file, self._row.number, "the tokenizer makes no tokens of an answer"))
            return
        given = {} if weights is None else {"weights": weights}
        self.add_arrays(token_ids=token_ids, supervised=supervised, **given)

    def add_arrays(self, **arrays: Sequence[Any] | np.ndarray) -> None:
        """Add a sample of these arrays: all fields, except that optional ones may be left out."""
        tokens = []
        for each in self.fields:
            values = arrays.pop(each.name, None)
            if values is None:
                assert each.optional, f"the sample lacks {each.name!r}"
                if each.name in self.arrays:
                    self.arrays[each.name].extend([1] * self.sizes[str(each.along)][-1])
                continue
            if each.along is None:
                self.sizes[each.name].append(len(values))
            else:
                assert len(values) == self.sizes[each.along][-1], f"{each.name!r} is not as long as {each.along!r}"
            if each.name not in self.arrays:
                before = sum(self.sizes[str(each.along)]) - len(values)
                self.arrays[each.name] = array(each.made_in, [1]) * before
            self._append(self.arrays[each.name], values)
            assert each.kind != "supervised" or not values[0], f"{each.name!r}: nothing predicts the first token"
            if each.kind == "tokens":
                tokens.append(values)
        assert not arrays, f"no field is called {next(iter(arrays))!r}"
        self.sample_hashes.append(sample_hash(*tokens))
        self.places.append(self._place)

    def _append(self, to: array[Any], values: Sequence[Any] | np.ndarray) -> None:
        if isinstance(values, (bytes, bytearray)):
            to.frombytes(values)
        elif isinstance(values, np.ndarray):
            to.frombytes(values.astype(to.typecode).tobytes())
        else:
            to.extend(values)

    def extend(self, other: SampleBlock) -> None:
        """Add the samples of ``other``, and its report."""
        for each in self.fields:
            if each.optional and (each.name in self.arrays or each.name in other.arrays):
                for block in (self, other):
                    size = sum(block.sizes[str(each.along)])
                    block.arrays.setdefault(each.name, array(each.made_in, [1]) * size)
        for mine, theirs in ((self.arrays, other.arrays), (self.sizes, other.sizes)):
            for name, values in theirs.items():
                mine[name].extend(values)
        self.sample_hashes.extend(other.sample_hashes)
        numbers = [self._number_of(file) for file in other.files]
        self.places.frombytes(renumbered(other.places, numbers).tobytes())
        self.report.add(other.report)


class SampleSet(Protocol):
    """What a run trains on: samples by number, and how many of each source make an epoch."""

    @property
    def sources(self) -> Sequence[Source]: ...

    @property
    def tokens(self) -> int: ...

    @property
    def supervised_tokens(self) -> int: ...

    @property
    def report(self) -> DataReport: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """int64: the length of each of the samples ``indices``, by which similar ones are put together: its tokens."""
        ...


@dataclass(frozen=True)
class TokenDataset:
    """Samples one after another: field f of sample i is ``[offsets[f][i], offsets[f][i + 1])`` of its flat array."""

    fields: tuple[Field, ...]
    """Those that are stored."""
    arrays: Mapping[str, np.ndarray]
    """Of each field, the values of all samples: token ids in uint16 or int32, supervision in bool."""
    offsets: Mapping[str, np.ndarray]
    """int64 [samples + 1] of each field; of fields of the same length, the same object."""
    sample_hashes: np.ndarray
    """uint64 [samples]: of each, ``sample_hash`` of its tokens"""
    report: DataReport
    fingerprint: str
    """A hash of the samples: a run that is resumed has to continue with the same."""
    supervised_tokens: int
    """Tokens that carry loss; 0 where no field says which."""
    directory: Path | None = None
    """The folder of the arrays, if they are mapped from files: other processes then map them too, without a copy."""
    places: np.ndarray | None = None
    """int64 [samples]: the row of each, see ``place_code``."""
    files: tuple[Path, ...] = ()
    """The files of these rows."""
    origin: Mapping[str, Any] | None = None
    """What they were made of: see ``panda.data.origin``."""

    @classmethod
    def of(cls, block: SampleBlock) -> TokenDataset:
        """The samples of ``block``, in memory."""
        fields = tuple(each for each in block.fields if each.name in block.arrays)
        arrays = {
            each.name: np.frombuffer(block.arrays[each.name], block.arrays[each.name].typecode).astype(
                "int32" if each.kind == "tokens" else each.type_of(0)
            )
            for each in fields
        }
        ends = {
            name: np.concatenate([[0], np.cumsum(np.array(sizes, dtype=np.int64))]).astype(np.int64)
            for name, sizes in block.sizes.items()
        }
        offsets = {each.name: ends[each.along or each.name] for each in fields}
        parts = [*arrays.values(), *ends.values()]
        digest = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
        hashes = np.array(block.sample_hashes, dtype=np.uint64)
        places = np.array(block.places, dtype=np.int64)
        supervised = supervised_in(fields, arrays)
        return cls(
            fields, arrays, offsets, hashes, block.report, digest, supervised, places=places, files=tuple(block.files)
        )

    def __len__(self) -> int:
        return len(self.sample_hashes)

    def __getitem__(self, index: int) -> Sample:
        found = {}
        for name, values in self.arrays.items():
            offsets = self.offsets[name]
            found[name] = values[offsets[index] : offsets[index + 1]]
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        if self.directory is not None:
            from panda.data.token_cache import open_cache

            return open_cache, (self.directory,)
        return TokenDataset, tuple(vars(self).values())

    def place(self, index: int) -> tuple[Path, int] | None:
        """The file and the row, counted from 1, of which sample ``index`` is made; None where that is not known."""
        code = UNKNOWN if self.places is None or not self.files else int(self.places[index])
        if code == UNKNOWN:
            return None
        file, row = file_and_row(code)
        return self.files[file], row

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        first, *others = self._measured
        lengths: np.ndarray = first[indices + 1] - first[indices]
        for offsets in others:
            lengths += offsets[indices + 1] - offsets[indices]
        return lengths

    @property
    def _measured(self) -> list[np.ndarray]:
        """The offsets of the fields of tokens; without any, of all that have lengths of their own."""
        of_tokens = [self.offsets[each.name] for each in self.fields if each.kind == "tokens"]
        return of_tokens or [self.offsets[each.name] for each in self.fields if each.along is None]

    @property
    def tokens(self) -> int:
        return sum(len(self.arrays[each.name]) for each in self.fields if each.kind == "tokens")

    @property
    def sources(self) -> Sequence[Source]:
        return (Source(len(self), len(self)),)


def supervised_in(fields: Iterable[Field], arrays: Mapping[str, Any]) -> int:
    """How many tokens of ``arrays`` carry loss."""
    return sum(int(np.count_nonzero(arrays[each.name])) for each in fields if each.kind == "supervised")


def in_memory(samples: Iterable[Mapping[str, Any]], fields: Sequence[Field] = TEXT) -> TokenDataset:
    """``samples``, each with an array or a list for each of ``fields``, as a data set that no file holds."""
    block = SampleBlock(fields)
    for sample in samples:
        block.add_arrays(**sample)
    return TokenDataset.of(block)


class MixedDataset:
    """Several data sets, each with the number of passes over it that an epoch makes."""

    def __init__(self, parts: Sequence[tuple[str, TokenDataset, float]]) -> None:
        """``parts``: a name, a data set, and the passes."""
        self.parts = [dataset for _, dataset, _ in parts]
        self.sources = tuple(Source(len(d), max(1, round(passes * len(d))), name) for name, d, passes in parts)
        self._ends = np.cumsum([len(dataset) for dataset in self.parts])
        self.tokens = sum(dataset.tokens for dataset in self.parts)
        self.supervised_tokens = sum(dataset.supervised_tokens for dataset in self.parts)
        described = [
            (dataset.fingerprint, source.per_epoch) for dataset, source in zip(self.parts, self.sources, strict=True)
        ]
        self.fingerprint = hashlib.sha256(repr(described).encode()).hexdigest()
        self.report = DataReport()
        for dataset in self.parts:
            self.report.add(dataset.report)

    @property
    def sample_hashes(self) -> np.ndarray:
        """uint64 [samples]"""
        return np.concatenate([dataset.sample_hashes for dataset in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        part, number = self._part(index)
        return self.parts[part][number]

    def place(self, index: int) -> tuple[Path, int] | None:
        """The file and the row, counted from 1, of which sample ``index`` is made; None where that is not known."""
        part, number = self._part(index)
        return self.parts[part].place(number)

    def _part(self, index: int) -> tuple[int, int]:
        """The part that has sample ``index``, and its number there."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - (int(self._ends[part - 1]) if part else 0)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        lengths = np.empty(len(indices), dtype=np.int64)
        start = 0
        for dataset, end in zip(self.parts, self._ends, strict=True):
            mine = (indices >= start) & (indices < end)
            lengths[mine] = dataset.lengths(indices[mine] - start)
            start = end
        return lengths
