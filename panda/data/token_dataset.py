"""Tokenised samples in flat arrays, and what was left out on the way."""

from __future__ import annotations

import functools
import hashlib
from array import array
from dataclasses import dataclass
from dataclasses import field

import numpy as np

from panda.data.reading import BadRow

SHOWN_BAD_ROWS = 10
"""Bad rows that are kept with their place and reason; the others are counted."""


@dataclass
class DataReport:
    """What became of the rows that were read."""

    files: int = 0
    rows: int = 0
    bad_rows: int = 0
    first_bad_rows: list[BadRow] = field(default_factory=list)
    truncated: int = 0
    """Samples that were longer than max_seq_length and lost tokens."""

    def add_bad(self, bad: BadRow) -> None:
        self.bad_rows += 1
        if len(self.first_bad_rows) < SHOWN_BAD_ROWS:
            self.first_bad_rows.append(bad)

    def lines(self) -> list[str]:
        """The report for a person: nothing where nothing was left out."""
        lines = [f"bad row: {bad}" for bad in self.first_bad_rows]
        if self.bad_rows:
            lines.append(f"{self.bad_rows} of {self.rows} rows cannot be used and are left out.")
        if self.truncated:
            lines.append(f"{self.truncated} samples are longer than max_seq_length and were cut.")
        return lines


@dataclass(frozen=True)
class TokenDataset:
    """Samples one behind another: sample i is ``[offsets[i], offsets[i + 1])`` of both flat arrays."""

    token_ids: np.ndarray
    """int32 [tokens]"""
    supervised: np.ndarray
    """bool [tokens]: whether this token is one to predict. The first token of a sample never is."""
    offsets: np.ndarray
    """int64 [samples + 1]"""
    report: DataReport

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and supervision of one sample, each [length]."""
        where = slice(self.offsets[index], self.offsets[index + 1])
        return self.token_ids[where], self.supervised[where]

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the samples: a run that is resumed has to go on with the same."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.token_ids, self.supervised, self.offsets):
            digest.update(part.tobytes())
        return digest.hexdigest()

    @property
    def supervised_tokens(self) -> int:
        return int(self.supervised.sum())


class TokenDatasetBuilder:
    """Appends samples; ``finish`` makes the data set."""

    def __init__(self) -> None:
        self.report = DataReport()
        self._token_ids = array("i")
        self._supervised = array("B")
        self._offsets = array("q", [0])

    def add(self, token_ids: list[int], unsupervised: int) -> None:
        """One sample, of whose tokens the first ``unsupervised`` carry no loss."""
        assert 1 <= unsupervised < len(token_ids)
        self._token_ids.extend(token_ids)
        self._supervised.extend(bytes(unsupervised) + b"\1" * (len(token_ids) - unsupervised))
        self._offsets.append(len(self._token_ids))

    def finish(self) -> TokenDataset:
        return TokenDataset(
            np.frombuffer(self._token_ids, dtype=np.int32),
            np.frombuffer(self._supervised, dtype=np.bool_),
            np.frombuffer(self._offsets, dtype=np.int64),
            self.report,
        )
