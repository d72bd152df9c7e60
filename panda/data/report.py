"""A report of the rows that were read: which were left out or cut, and which of their fields nothing used."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from dataclasses import field
from itertools import groupby
from pathlib import Path
from typing import Any

from panda.data.reading import BadRow
from panda.files.terminal import number_of
from panda.files.terminal import printable_line

SHOWN_BAD_ROWS = 10
"""Bad rows that are kept with their place and reason; the others are only counted, by reason."""
KEPT_REASONS = 50
KEPT_FIELDS = 200
"""Unused fields that are counted by name; the rows of the others are counted together."""
SHOWN_FIELDS = 20
OTHER_FIELDS = "..."


@dataclass
class DataReport:
    """How many rows were read, which were left out or cut, and which of their fields were not used."""

    files: int = 0
    rows: int = 0
    bad_rows: int = 0
    first_bad_rows: list[BadRow] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    """Bad rows by reason, with the numbers in it left out."""
    truncated: int = 0
    """Samples that were longer than max_seq_length and lost tokens."""
    altered: int = 0
    """Rows whose text their tokens do not give back."""
    unused: Counter[str] = field(default_factory=Counter)
    """Fields that rows have and nothing used, with the number of rows; nested ones by a path, ``messages[].id``."""
    notes: list[str] = field(default_factory=list)
    """What is said of the data besides its rows, a line each: files and samples that are held out."""
    samples: int | None = None
    """The samples that ``truncated`` counts among, where a run uses only some of them."""

    def add_bad(self, bad: BadRow) -> None:
        self.bad_rows += 1
        self._keep(bad)
        reason = re.sub(r"\d+", "…", bad.problem)
        self.reasons[reason if reason in self.reasons or len(self.reasons) < KEPT_REASONS else "other reasons"] += 1

    def add_unused(self, name: str, rows: int = 1) -> None:
        """Count a field that ``rows`` rows have and that was not used."""
        kept = name in self.unused or len(self.unused) < KEPT_FIELDS
        self.unused[name if kept else OTHER_FIELDS] += rows

    def add(self, other: DataReport) -> None:
        """Add what ``other`` counted."""
        self.files += other.files
        self.rows += other.rows
        self.bad_rows += other.bad_rows
        self.truncated += other.truncated
        self.altered += other.altered
        self.reasons += other.reasons
        for name, rows in other.unused.items():
            self.add_unused(name, rows)
        self.notes += other.notes
        for bad in other.first_bad_rows:
            self._keep(bad)

    def _keep(self, bad: BadRow) -> None:
        if len(self.first_bad_rows) < SHOWN_BAD_ROWS:
            self.first_bad_rows.append(bad)

    def cut(self, samples: int, limit: int) -> str:
        """One line: how many of the ``samples`` were cut to ``limit`` tokens, max_seq_length."""
        if not self.truncated:
            return f"no sample is cut to {number_of(limit, 'token')}"
        samples = self.samples or samples
        share = self.truncated / samples
        written = f"{share:.1%}" if share >= 0.0005 else "less than 0.1%"
        verb = "is" if self.truncated == 1 else "are"
        whole = f"{self.truncated:,} of {number_of(samples, 'sample')} ({written}) {verb}"
        return f"{whole} cut to {number_of(limit, 'token')} (max_seq_length)"

    def lines(self) -> list[str]:
        """The report, line by line, for a terminal; empty where nothing was left out or not used."""
        lines = [f"bad row: {line}" for line in self.first_bad_lines()]
        if self.bad_rows:
            verb = "is" if self.bad_rows == 1 else "are"
            lines.append(f"{self.bad_rows:,} of {number_of(self.rows, 'row')} cannot be used and {verb} left out.")
        if self.altered:
            rows = number_of(self.altered, "row has", "rows have")
            lines.append(f"{rows} characters that the tokenizer cannot write, and leaves out or makes unknown.")
        return [*lines, *self.unused_lines(), *map(printable_line, self.notes)]

    def unused_lines(self) -> list[str]:
        """The fields that nothing used, a line each; those in most rows first."""
        named = [(name, rows) for name, rows in self.unused.most_common() if name != OTHER_FIELDS]
        lines = [f"the field {name!r} is not used ({number_of(rows, 'row')})" for name, rows in named[:SHOWN_FIELDS]]
        more = len(named) - SHOWN_FIELDS
        if more > 0:
            at_least = "at least " if OTHER_FIELDS in self.unused else ""
            lines.append(f"{at_least}{number_of(more, 'more field is', 'more fields are')} not used")
        return lines

    def first_bad_lines(self) -> list[str]:
        """The bad rows that are kept: a line for consecutive ones of one file that have the same problem."""
        lines = []
        for (file, problem), alike in groupby(self.first_bad_rows, key=lambda bad: (bad.file, bad.problem)):
            first, *more = alike
            numbers = ", ".join(str(bad.number) for bad in (first, *more))
            lines.append(printable_line(f"{file}, rows {numbers}: {problem}" if more else str(first)))
        return lines

    def as_json(self) -> dict[str, Any]:
        """Plain objects from which ``from_json`` makes an equal report."""
        bad = [[str(row.file), row.number, row.problem] for row in self.first_bad_rows]
        counted = {"reasons": dict(self.reasons), "unused": dict(self.unused)}
        return vars(self) | counted | {"first_bad_rows": bad}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> DataReport:
        bad = [BadRow(Path(file), number, problem) for file, number, problem in plain["first_bad_rows"]]
        counted = {name: Counter(plain[name]) for name in ("reasons", "unused")}
        return cls(**plain | counted | {"first_bad_rows": bad})
