"""The interface of readers, and the files that they are given."""

from __future__ import annotations

import gzip
import os
import zlib
from abc import ABC
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from contextlib import nullcontext
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any
from typing import BinaryIO
from typing import Protocol
from typing import cast
from typing import runtime_checkable

from panda.registry import UserError
from panda.registry.location import resolve_path
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
        yield from reader.read(file)


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


@contextmanager
def open_binary(file: Path) -> Iterator[BinaryIO]:
    """The bytes of ``file``, unpacked where its name ends in ``.gz``. Raises UserError where they cannot be read."""
    packed = file.name.lower().endswith(".gz")
    try:
        with cast(BinaryIO, gzip.open(file) if packed else file.open("rb")) as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as problem:
        raise UserError(f"{file}: not a complete gzip file: {problem}. Is it cut short?") from None
    except OSError as problem:
        raise UserError(f"{file}: cannot be read: {problem.strerror or problem}.") from None


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


Locations = str | Sequence[str]
"""Where data is: a path or a pattern, or several."""


def each_of(locations: Locations) -> tuple[str, ...]:
    """The paths and patterns that ``locations`` is."""
    return (locations,) if isinstance(locations, str) else tuple(locations)


def identities(locations: Locations) -> set[tuple[int, int]]:
    """Device and inode of each file at ``locations``: a link to one has the same. Empty for none."""
    return {_identity(file) for location in each_of(locations) for file, _ in _all_files(location)}


def without(files: list[Path], held_out: set[tuple[int, int]]) -> list[Path]:
    """``files`` without those whose identities are in ``held_out``."""
    return [file for file in files if _identity(file) not in held_out]


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_dev, status.st_ino


def data_files(locations: Locations, suffixes: tuple[str, ...], option: str) -> list[Path]:
    """The files to read at ``locations``, in the order of these, and of each sorted by their paths.

    One is a file, a folder, which is read recursively, or a pattern of either; only hidden files and folders are left
    out. ``option`` is the key that errors name. Raises UserError where there is nothing to read.
    """
    return [file for files in files_by_location(locations, suffixes, option) for file in files]


def files_by_location(locations: Locations, suffixes: tuple[str, ...], option: str) -> list[list[Path]]:
    """The same files, by location. A file that several locations name belongs to the first one, and is read once."""
    texts = each_of(locations)
    if not texts:
        raise UserError(f"{option}: no path is given. Give a folder of {_named(suffixes)} files, or such files.")
    seen: set[tuple[int, int]] = set()
    found = []
    for text in texts:
        files = [file for file in _files_at(text, suffixes, option) if _identity(file) not in seen]
        if not files:
            raise UserError(f"{option}: all files of {text!r} are those of paths before it. Leave it out.")
        seen.update(map(_identity, files))
        found.append(files)
    return found


def _files_at(location: str, suffixes: tuple[str, ...], option: str) -> list[Path]:
    """The files to read at ``location``. Raises UserError where there are none."""
    candidates = _all_files(location)
    found = [file for file, is_named in candidates if is_named or file.name.lower().endswith(suffixes)]
    if found:
        return found
    if not candidates and _is_pattern(location):
        raise UserError(f"{option}: nothing matches the pattern {location!r} (looked in {Path.cwd()}).")
    if not candidates and not os.path.exists(resolve_path(location)):
        raise UserError(
            f"{option}: {location!r} does not exist (looked in {Path.cwd()}). Give a folder of {_named(suffixes)}"
            " files, or one such file."
        )
    others = sorted({file.suffix or file.name for file, _ in candidates})
    hint = " `reader` says how files are read; `panda list readers`." if others else ""
    seen = f"it has {', '.join(others[:5])}" if others else "it is empty"
    raise UserError(f"{option}: {location!r} has no file that ends in {_named(suffixes)}; {seen}.{hint}")


def _all_files(location: str) -> list[tuple[Path, bool]]:
    """The files at ``location``, sorted; of each whether it is named itself, and so is read whatever its ending is.

    A pattern names what it matches if it has an ending: ``more/*.log`` does, ``more/*`` does not.
    """
    path = resolve_path(location)
    matches, named = [path], True
    if _is_pattern(location):
        matches = sorted(map(Path, glob(str(path), recursive=True)))
        named = not set("*?[]") & set(path.suffix or "*")
    found = {}
    for match in matches:
        if match.is_file():
            found[match] = named
        elif match.is_dir():
            found.update({file: found.get(file, False) for file in sorted(_files_below(match))})
    return list(found.items())


def _is_pattern(location: str) -> bool:
    return bool(set("*?[") & set(location)) and not os.path.exists(resolve_path(location))


def other_files(locations: Locations, suffixes: tuple[str, ...]) -> Counter[str]:
    """The endings of the files at ``locations`` that ``data_files`` leaves out, with their number."""
    left_out = {
        file
        for location in each_of(locations)
        for file, is_named in _all_files(location)
        if not is_named and not file.name.lower().endswith(suffixes)
    }
    return Counter(file.suffix or file.name for file in left_out)


def _named(suffixes: tuple[str, ...]) -> str:
    return " or ".join(suffix for suffix in suffixes if not suffix.endswith(".gz"))


def _files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files that are not hidden. Links to folders are followed, except to one of those ``above``."""
    real = folder.resolve()
    for entry in folder.iterdir() if real not in above else ():
        if not entry.name.startswith("."):
            if entry.is_dir():
                yield from _files_below(entry, (*above, real))
            elif entry.is_file():
                yield entry
