"""Packed files, known by what they begin with and not by their names: gzip, bzip2, xz and zstd."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from typing import cast

from panda.registry import UserError

ENDINGS = (".gz", ".bz2", ".xz", ".zst")
"""Endings of names of packed files."""
# No text begins so: it would not be UTF-8, or, of bzip2, begin with this number in the middle of a word.
_BEGINNINGS = {
    b"\x1f\x8b": "gzip",
    b"BZh91AY&SY": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_OTHERS = {
    b"PAR1": "Parquet. Name it so that it ends in .parquet, or write `reader: parquet`",
    b"ARROW1": "Arrow. Name it so that it ends in .arrow, or write `reader: parquet`",
    b"\xff\xff\xff\xff": "Arrow. Name it so that it ends in .arrow, or write `reader: parquet`",
    b"\xff\xfe": "UTF-16. Convert it to UTF-8",
    b"\xfe\xff": "UTF-16. Convert it to UTF-8",
    b"PK\x03\x04": "a zip archive. Unpack it",
}
"""What else may have been named as if it were text, and what to do with it."""
_LONGEST = max(map(len, (*_BEGINNINGS, *_OTHERS)))


def with_packed(*suffixes: str) -> tuple[str, ...]:
    """``suffixes``, and those of packed files of the same kinds."""
    return (*suffixes, *(suffix + ending for ending in ENDINGS for suffix in suffixes))


def unpacked_name(file: Path) -> str:
    """The name of ``file`` in lower case, without the ending of packed files."""
    name = file.name.lower()
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


def beginning(file: Path) -> bytes:
    """The first bytes of ``file``; none where it cannot be read."""
    try:
        with file.open("rb") as stream:
            return stream.read(_LONGEST)
    except OSError:
        return b""


@contextmanager
def open_binary(file: Path) -> Iterator[BinaryIO]:
    """The bytes of ``file``, unpacked if it is packed. Raises UserError where they cannot be read."""
    packing = None
    try:
        with file.open("rb") as stream:
            packing = _packing(stream.peek(_LONGEST))
            if packing is None and unpacked_name(file) != file.name.lower() and stream.peek(1):
                raise UserError(
                    f"{file}: its name is that of a packed file, and it does not begin as one. Is it damaged?"
                )
            with _unpacked(file, stream, packing) as unpacked:
                yield unpacked
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as problem:
        if isinstance(problem, OSError) and (packing is None or problem.strerror):
            raise UserError(f"{file}: cannot be read: {problem.strerror or problem}.") from None
        raise UserError(f"{file}: not a complete {packing} file: {problem}. Is it cut short?") from None


def _packing(begun: bytes) -> str | None:
    bzip2 = b"BZh"
    if begun.startswith(bzip2):  # after it, a digit: the size of blocks
        begun = bzip2 + b"9" + begun[4:]
    return next((name for magic, name in _BEGINNINGS.items() if begun.startswith(magic)), None)


def _unpacked(file: Path, stream: BinaryIO, packing: str | None) -> BinaryIO:
    if packing == "gzip":
        return cast(BinaryIO, gzip.open(stream))
    if packing == "bzip2":
        return cast(BinaryIO, bz2.open(stream))
    if packing == "xz":
        return cast(BinaryIO, lzma.open(stream))
    if packing == "zstd":  # Python has it from 3.14 on
        try:
            from pyarrow import CompressedInputStream
        except ImportError:
            raise UserError(
                f"{file}: zstd needs pyarrow. Install it: pip install 'panda-train[data]'. Or unpack the file."
            ) from None
        return io.BufferedReader(CompressedInputStream(stream, "zstd"))
    return stream


def not_utf8(file: Path, line: int, byte: int) -> UserError:
    """The error for a file of text with a byte, in its line ``line``, that is not UTF-8."""
    begun = beginning(file)
    found = next((what for magic, what in _OTHERS.items() if begun.startswith(magic)), None)
    advice = f"It begins as {found}." if found else "Convert the file to UTF-8."
    return UserError(f"{file}:{line}: not UTF-8: byte {byte:#04x}. {advice}")
