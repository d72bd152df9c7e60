"""The interface of readers: files to rows, and which fields of a row were read."""

from __future__ import annotations

from abc import ABC
from abc import abstractmethod
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import BinaryIO
from typing import Protocol
from typing import runtime_checkable

from panda.registry import UserError
from panda.registry.offers import maker


@dataclass(frozen=True)
class Row:
    """A row of a data file."""

    fields: Mapping[str, Any]
    file: Path
    number: int
    """Counted from 1 in its file, bad rows included."""

    @property
    def place(self) -> str:
        return f"{self.file}, row {self.number}"


class LazyFields(Mapping[str, Any], ABC):
    """Fields of a row whose values cost something to make: one is made when it is asked for."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is a field ``name`` that is not null, without making its value."""

    @property
    @abstractmethod
    def size(self) -> int:
        """About how many bytes the fields have."""


class Unconverted:
    """A value of a type that no task reads as it is: it only says its type, ``timestamp[ns]``."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


class Fields(dict[str, Any]):
    """An object of a row, which remembers the fields that were read: what nobody read is reported, not dropped.

    ``in``, ``len`` and iteration do not read a field; anything that returns its value does. A field that is null
    says nothing, and is never reported.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._lazy = fields if isinstance(fields, LazyFields) else None
        super().__init__(fields if self._lazy is None else dict.fromkeys(fields))
        self._read: set[str] = set()
        self._unused: dict[str, None] = {}

    def __getitem__(self, name: str) -> Any:
        self._note_read(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._note_read(name)
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        self._note_read(name)
        return super().pop(name, *default)

    def _note_read(self, name: str) -> None:
        if self._lazy is not None and name not in self._read and name in self:
            self[name] = self._lazy[name]
        self._read.add(name)

    def __iter__(self) -> Iterator[str]:  # without it, dict(fields) copies the values past __getitem__
        return super().__iter__()

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)

    def values(self) -> Any:
        for name in self:
            self._note_read(name)
        return super().values()

    def items(self) -> Any:
        for name in self:
            self._note_read(name)
        return super().items()

    def has(self, name: str) -> bool:
        """Whether there is a field ``name`` that is not null, without reading it."""
        if self._lazy is not None and name in self and name not in self._read:
            return self._lazy.has(name)
        return super().get(name) is not None

    def leave(self, path: str) -> None:
        """Note that ``path``, a field or one within a field (``messages[].weight``), is not used, read or not."""
        self._unused[path] = None

    def leave_unread(self, within: str, inner: Fields) -> None:
        """Note the unused fields of ``inner``, an object that was found at the path ``within``."""
        for path in inner.unused():
            self.leave(f"{within}.{path}")

    def unused(self) -> list[str]:
        """The paths of the fields that were not used, each once."""
        unread = {name: None for name in self if name not in self._read and self.has(name)}
        return list(unread | self._unused)


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    file: Path
    number: int
    problem: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.number}: {self.problem}"


@runtime_checkable
class Reader(Protocol):
    """Turns a file into rows: what the factories of ``register_reader`` return."""

    suffixes: tuple[str, ...]
    """Endings of the names of files that it reads: ``(".json", ".jsonl")``."""

    def read(self, file: Path) -> Iterator[Row | BadRow]:
        """The rows of ``file``, in order. Raises UserError where the file as a whole cannot be read."""
        ...


def rows_of(reader: Reader, file: Path) -> Iterator[Row | BadRow]:
    """What ``reader`` reads of ``file``. An exception in it names the distribution of the reader."""
    offer = maker(reader)
    with offer.attributed("`read`") if offer else nullcontext():
        rows = reader.read(file)
        if not isinstance(rows, Iterable):
            raise UserError(f"{_whose(reader)} returned {rows!r} for {file}, and not rows: let `read` yield them.")
        for row in rows:
            if not isinstance(row, (Row, BadRow)):
                raise UserError(
                    f"{_whose(reader)} yielded a {type(row).__name__} for a row of {file}: yield"
                    " `panda.data.reading.Row(fields, file, number)` or a `BadRow`."
                )
            yield row


def _whose(reader: Reader) -> str:
    offer = maker(reader)
    return f"reader {offer.name!r} of {offer.describe()}" if offer else f"the reader {type(reader).__qualname__}"


def too_large(limit: int, advice: str = "") -> str:
    """The problem of a row of more than ``limit`` bytes."""
    return f"it has more than {limit:,} bytes (max_row_bytes){advice}"


def kind_of(value: Any) -> str:
    """The kind of a value of a row, in words: ``an array``."""
    if isinstance(value, Unconverted):
        return f"a value of type {value.kind}"
    return _KINDS.get(type(value), type(value).__name__)


_KINDS: dict[type, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


WINDOW = 1 << 20
"""Bytes that are read at a time."""


def lines(stream: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """The lines of ``stream``, each with its end; None for one of more than ``limit`` bytes, which is not held."""
    while line := stream.readline(limit + 2):
        if len(line.removesuffix(b"\n").removesuffix(b"\r")) <= limit:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(WINDOW)
        yield None
