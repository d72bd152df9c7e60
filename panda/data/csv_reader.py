"""The ``csv`` reader: tables with a header line, a row of which may span several lines within quotes."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from panda.data.packed_files import not_utf8
from panda.data.packed_files import open_binary
from panda.data.packed_files import unpacked_name
from panda.data.packed_files import with_packed
from panda.data.reading import WINDOW
from panda.data.reading import BadRow
from panda.data.reading import Row
from panda.data.reading import too_large
from panda.files.terminal import number_of
from panda.registry import UserError
from panda.registry import register_reader
from panda.registry.contexts import ReaderContext


@dataclass(frozen=True)
class CsvOptions:
    """Options of the csv reader."""

    csv_delimiter: str | None = None
    """The character between the columns; by default a tab in `.tsv` files, and a comma in others."""

    def __post_init__(self) -> None:
        if self.csv_delimiter is not None and (len(self.csv_delimiter) != 1 or self.csv_delimiter in '"\r\n'):
            raise UserError(f"csv_delimiter: {self.csv_delimiter!r} is not one character between columns, such as `;`.")


@register_reader("csv", options=CsvOptions)
class CsvReader:
    """Comma- and tab-separated values in UTF-8, also packed: the first line names the fields; each value is text."""

    suffixes = with_packed(".csv", ".tsv")

    def __init__(self, options: CsvOptions, context: ReaderContext) -> None:
        self.delimiter = options.csv_delimiter
        self.limit = context.max_row_bytes

    def read(self, file: Path) -> Iterator[Row | BadRow]:
        """Rows in order, numbered without the header. An empty value is null. Blank lines are no rows.

        A header that names no fields, or one twice, and a quote that is never closed are errors.
        """
        delimiter = self.delimiter or ("\t" if unpacked_name(file).endswith(".tsv") else ",")
        # The limit of the csv module counts characters of a field, and is one for the whole process.
        csv.field_size_limit(max(csv.field_size_limit(), self.limit))
        with open_binary(file) as stream:
            text = _Lines(file, stream, self.limit)
            records = _records(text, csv.reader(text, delimiter=delimiter, strict=True))
            header = next(records, None)
            if header is None:
                raise UserError(f"{file}: the file is empty. Expected a line with the names of fields, and rows.")
            if isinstance(header, str):
                raise UserError(f"{file}: the first row has to name the fields: {header}")
            names = _names(file, header, delimiter)
            number = 0
            for number, record in enumerate(records, 1):
                if problem := _problem(record, header):
                    yield BadRow(file, number, f"line {text.begin}: {problem}")
                else:
                    yield Row({name: value or None for name, value in zip(names, record, strict=True)}, file, number)
            if number == 0:
                raise UserError(f"{file}: the file has a header and no rows.")


def _problem(record: list[str] | str, header: list[str]) -> str | None:
    if isinstance(record, str):
        return record
    if record == header:
        return "it repeats the header"
    if len(record) != len(header):
        values = number_of(len(record), "value")
        return f"it has {values} for {number_of(len(header), 'field')}"
    return None


def _names(file: Path, header: list[str], delimiter: str) -> list[str]:
    """The names of the fields. A column without one is called by its number."""
    names = [name.strip() or f"column {number}" for number, name in enumerate(header, 1)]
    twice = [repr(name) for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(
            f"{file}: the header names the field {' and '.join(twice)} more than once. Give each column its own name."
        )
    other = next((each for each in ("\t", ";", ",", "|") if each != delimiter and each in header[0]), None)
    if len(names) == 1 and other:
        raise UserError(
            f"{file}: with {delimiter!r} between columns there is only one, {names[0]!r}. If it is {other!r} that is"
            f" between them, write `csv_delimiter: {json.dumps(other)}`."
        )
    return names


def _records(text: _Lines, reader: Iterator[list[str]]) -> Iterator[list[str] | str]:
    """The records of ``text`` that ``reader`` reads: their values, or what is wrong with one. Blank lines are none."""
    while True:
        text.begin_record()
        try:
            if record := next(reader):
                yield record
        except StopIteration:
            return
        except _TooLargeError:
            text.skip_record()
            yield too_large(text.limit)
        except csv.Error as problem:
            if str(problem) == "unexpected end of data":
                text.refuse_open_quote()
            yield f"not valid CSV: {problem}"  # the module goes on with the next line


class _TooLargeError(Exception):
    """The record that is being read has more bytes than a row may have."""


class _Lines:
    """The lines of a file, for the csv module, which asks for the next one only while a record is not complete."""

    def __init__(self, file: Path, stream: BinaryIO, limit: int) -> None:
        self.file, self.stream, self.limit = file, stream, limit
        self.begin = 1
        """The line in which the newest record begins."""
        self._line = 0
        """Lines that were read."""
        self._size = self._quotes = 0
        """Bytes of the newest record, and the quotes in it: while their number is odd, it goes on."""
        self._ended = True
        """Whether the newest line was read to its end."""

    def begin_record(self) -> None:
        self.begin, self._size, self._quotes = self._line + 1, 0, 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw = self._read(self.limit + 2)
        if not raw:
            raise StopIteration
        self._size += len(raw)
        ends = len(raw) - len(raw.removesuffix(b"\n").removesuffix(b"\r"))
        if self._size - ends > self.limit:
            raise _TooLargeError
        try:
            return raw.decode("utf-8-sig" if self._line == 1 else "utf-8")
        except UnicodeDecodeError as problem:
            raise not_utf8(self.file, self._line, problem.object[problem.start]) from None

    def skip_record(self) -> None:
        """Read on to the end of the newest record, without holding it."""
        while not self._ended or self._quotes % 2:
            if not self._read(WINDOW):
                break
        if self._quotes % 2:
            self.refuse_open_quote()

    def refuse_open_quote(self) -> None:
        raise UserError(
            f"{self.file}:{self.begin}: a quote that is opened in this row is never closed, so the row goes on to the"
            " end of the file. Close it; a quote within quotes is written twice."
        )

    def _read(self, size: int) -> bytes:
        raw = self.stream.readline(size)
        self._line += bool(raw) and self._ended
        self._quotes += raw.count(b'"')
        self._ended = raw.endswith(b"\n") or not raw
        return raw
