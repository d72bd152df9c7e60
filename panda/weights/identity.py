"""What tells weights from others, by their content: every tensor counts, at the cost of a few reads of each.

A hash over the name, type, shape and bytes of every tensor: of one of up to 256 KiB all bytes, of a larger
one blocks of 4 KiB, two to sixteen, evenly spread from its first byte to its last. That is enough to tell a
fine-tune from its base, and a base from one that had a norm, a bias or a layer changed; not to find a few
elements that were changed in a large matrix. Imports no torch.
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
_FORM, _FORM_OF_FILES = "tensors-sha256:", "sha256:"


def identity(files: list[Path], pattern: str, base: str | None = None, like: str | None = None) -> str:
    """The identity of the weights in ``files``; of a delta's, together with that of its ``base``.

    However safetensors are spread over files, the same tensors have the same. With ``like``, an identity that
    was recorded, it is in the form of that one: an older panda sampled files, all whose names match ``pattern``, and
    knew nothing of tensors.
    Raises UserError for a file that is cut off.
    """
    digest = hashlib.sha256()
    lines = sorted(line for file in files for line in _lines(file))
    form = _FORM_OF_FILES if like and like.startswith(_FORM_OF_FILES) else _FORM
    if form == _FORM:
        digest.update("\n".join(lines).encode())
    else:
        for file in sorted(files[0].parent.glob(pattern)):  # whether read or not
            digest.update(_sampled_as_file(file))
    digest.update((base or "").encode())
    return f"{form}{digest.hexdigest()[:16]}"


def _lines(file: Path) -> Iterator[str]:
    """Of each tensor in ``file`` what it is called, and a hash of its bytes."""
    with file.open("rb") as stream:
        for label, begin, size in _extents(file, stream):
            yield f"{label} {_sampled(stream, begin, size)}"


def _extents(file: Path, stream: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Of each tensor in ``file`` what it is called, where it begins, and its bytes."""
    end = file.stat().st_size
    if file.suffix == ".safetensors":
        length = int.from_bytes(stream.read(8), "little")
        try:
            header: Any = json.loads(stream.read(length)) if 8 + length <= end else None
            entries = {name: about for name, about in header.items() if name != "__metadata__"}
            extents = [
                (f"{name} {about['dtype']} {about['shape']}", *about["data_offsets"]) for name, about in entries.items()
            ]
        except (ValueError, AttributeError, KeyError, TypeError):
            raise damaged(file, "it has no header") from None
        for label, first, last in extents:
            if 8 + length + last > end:
                raise damaged(file, f"{label.partition(' ')[0]} is not whole")
            yield label, 8 + length + first, last - first
    elif zipfile.is_zipfile(stream):  # as torch writes it: a storage an entry, not packed, by numbers
        with zipfile.ZipFile(stream) as archive:
            for entry in archive.infolist():
                name = entry.filename.partition("/")[2]
                if name.startswith("data"):
                    stream.seek(entry.header_offset + 26)  # two lengths, of what stands before the content
                    before = 30 + sum(int.from_bytes(stream.read(2), "little") for _ in range(2))
                    yield f"{file.name} {name} {entry.CRC}", entry.header_offset + before, entry.file_size
    else:  # of torch before 1.6, or cut off, which its reader tells
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


def _sampled_as_file(file: Path) -> bytes:
    """What an older panda read of ``file``: its size, the first MiB, and 256 blocks of 4 KiB, evenly spread."""
    size = file.stat().st_size
    parts = [size.to_bytes(8, "little")]
    with file.open("rb") as stream:
        parts.append(stream.read(2**20))
        for block in range(256):
            stream.seek(block * size // 256)
            parts.append(stream.read(4096))
    return b"".join(parts)
