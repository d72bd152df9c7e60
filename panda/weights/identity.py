"""The identity of weights: a hash of their content to which every tensor contributes, at the cost of a few reads each.

It covers the name, type, shape and bytes of every tensor: all bytes of a tensor of up to 256 KiB; of a larger
one, two to sixteen blocks of 4 KiB, evenly spread from its first byte to its last. This tells a fine-tune
from its base, and a base from a copy with a changed norm, bias or layer. It does not notice a few changed
elements in a large matrix. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from typing import BinaryIO

from panda.weights.shards import damaged

_WHOLE, _BLOCK, _STRIDE, _LEAST, _MOST = 2**18, 2**12, 2**22, 2, 16


def identity_of(files: list[Path], base: str | None = None) -> str:
    """The identity of the weights in ``files``; that of a delta includes the identity of its ``base``.

    The same tensors have the same identity however they are spread over safetensors files.
    Raises UserError for a file that is cut off.
    """
    digest = hashlib.sha256()
    digest.update("\n".join(sorted(line for file in files for line in _lines(file))).encode())
    digest.update((base or "").encode())
    return f"tensors-sha256:{digest.hexdigest()[:16]}"


def _lines(file: Path) -> Iterator[str]:
    """The label of each tensor in ``file``, and a hash of its bytes."""
    with file.open("rb") as stream:
        for label, begin, size in _extents(file, stream):
            yield f"{label} {_sampled(stream, begin, size)}"


def _extents(file: Path, stream: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """The label of each tensor in ``file``, the offset of its first byte, and its size in bytes."""
    end = file.stat().st_size
    if file.suffix == ".safetensors":
        length = int.from_bytes(stream.read(8), "little")
        try:
            header: Any = json.loads(stream.read(length)) if 8 + length <= end else None
            entries = {name: about for name, about in header.items() if name != "__metadata__"}
            extents = [
                (f"{name} {about['dtype']} {about['shape']}", *about["data_offsets"]) for name, about in entries.items()
            ]
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise damaged(file, "it has no header") from None
        for label, first, last in extents:
            if 8 + length + last > end:
                raise damaged(file, f"{label.partition(' ')[0]} is incomplete")
            yield label, 8 + length + first, last - first
    elif zipfile.is_zipfile(stream):  # as torch writes it: one uncompressed entry a storage, named by number
        with zipfile.ZipFile(stream) as archive:
            for entry in archive.infolist():
                name = entry.filename.partition("/")[2]
                if name.startswith("data"):
                    stream.seek(entry.header_offset + 26)  # the lengths of name and extra field, before the content
                    before = 30 + sum(int.from_bytes(stream.read(2), "little") for _ in range(2))
                    yield f"{file.name} {name} {entry.CRC}", entry.header_offset + before, entry.file_size
    else:  # written by torch before 1.6, or cut off, which reading it reports
        yield file.name, 0, end


def _sampled(stream: BinaryIO, begin: int, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    if size <= _WHOLE:
        stream.seek(begin)
        digest.update(stream.read(size))
    else:
        blocks = min(max(size // _STRIDE, _LEAST), _MOST)
        for block in range(blocks):
            stream.seek(begin + block * (size - _BLOCK) // (blocks - 1))
            digest.update(stream.read(_BLOCK))
    return digest.hexdigest()
