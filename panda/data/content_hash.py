"""The content of files as a hash, remembered by size and time so that a large file is read once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import ExitStack
from contextlib import contextmanager
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from panda.registry import UserError

_SETTLED_SECONDS = 2.0
"""A file that was written later than this before it was hashed may change again within the same time stamp."""


def content_hash(file: Path, memory: Path, progress: Callable[[int], None]) -> str:
    """SHA-256 of the content of ``file``, in hex; remembered in the folder ``memory``.

    Where the file has to be read ``progress`` is told of the bytes of each piece.

    The remembered value holds while device, inode, size and modification time stay as they are. Of
    the ranks of a run, which all ask when it starts, one reads the file; the others wait at a lock,
    before there is a process group, and find what it remembered.
    """
    known = _recall(file, memory)
    if known is not None:
        return known
    with _alone(memory):
        return _recall(file, memory) or _read(file, memory, progress)


def _read(file: Path, memory: Path, progress: Callable[[int], None]) -> str:
    try:
        before = file.stat()
        with _Told(file) as stream:
            stream.progress = progress
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if stamp(file.stat()) != stamp(before):
            raise UserError(f"{file}: the file changed while it was read. Start again when it is complete.")
    except OSError as problem:
        raise UserError(f"{file}: cannot be read: {problem.strerror}") from None
    if time.time() - before.st_mtime > _SETTLED_SECONDS:
        remember(file, digest, memory)
    return digest


def remember(file: Path, digest: str, memory: Path) -> None:
    """Have ``content_hash`` know that ``digest`` is the hash of ``file`` as it is now."""
    note = _note(file, memory)
    temporary = note.with_name(f"{note.name}.{os.getpid()}")
    with suppress(OSError):  # a disk that is full, a folder that is read-only: it is hashed again next time
        memory.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps([stamp(file.stat()), digest]), encoding="utf-8")
        temporary.replace(note)


def stamp(status: os.stat_result) -> list[int]:
    """What changes when a file changes."""
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]


class _Told(FileIO):
    """A file that tells how much is read of it."""

    progress: Callable[[int], None]

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        self.progress(count)
        return count


@contextmanager
def _alone(memory: Path) -> Iterator[None]:
    """Hold the lock of the folder ``memory``, if it can have one. The system frees that of a process that dies."""
    with ExitStack() as held:
        with suppress(OSError):  # a read-only folder: what cannot be remembered each reads for itself
            memory.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((memory / "lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _recall(file: Path, memory: Path) -> str | None:
    try:
        remembered, digest = json.loads(_note(file, memory).read_bytes())
        return str(digest) if remembered == stamp(file.stat()) else None
    except (OSError, ValueError):
        return None


def _note(file: Path, memory: Path) -> Path:
    return memory / hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:32]
