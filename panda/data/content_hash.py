"""The content of files as a hash, remembered by size and time so that a large file is read only once."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from panda.files.locks import held
from panda.registry import UserError

_SETTLED_SECONDS = 2.0
"""A file that was written more recently before it was hashed may change again within the same time stamp."""


def content_hash(file: Path, memory: Path, progress: Callable[[int], None]) -> str:
    """SHA-256 of the content of ``file``, in hex; remembered in the folder ``memory``.

    Where the file has to be read, ``progress`` is called with the number of bytes of each piece.

    The remembered value is used as long as device, inode, size and both times of change stay the same. All
    ranks of a run ask for it when it starts, before there is a process group: one reads the file, the
    others wait for a lock and find what the first one remembered.
    """
    known = _recall(file, memory)
    if known is not None:
        return known
    with ExitStack() as stack:
        with suppress(OSError):  # a read-only folder, in which nothing can be remembered: each rank reads the file
            memory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(memory / "lock", waiting=_say_who_reads))
        return _recall(file, memory) or _read(file, memory, progress)


def _say_who_reads(holder: str) -> None:
    print(f"waiting for the hash of a file's content, which is computed by {holder}", flush=True)


def _read(file: Path, memory: Path, progress: Callable[[int], None]) -> str:
    try:
        before = file.stat()
        with _CountedFile(file) as stream:
            stream.progress = progress
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if stamp(file.stat()) != stamp(before):
            raise UserError(f"{file}: the file changed while it was read. Start again when it is complete.")
    except OSError as problem:
        raise UserError(f"{file}: cannot be read: {problem.strerror}") from None
    if time.time() - max(before.st_mtime, before.st_ctime) > _SETTLED_SECONDS:
        remember(file, digest, memory)
    return digest


def remember(file: Path, digest: str, memory: Path) -> None:
    """Make ``content_hash`` return ``digest`` for ``file`` as it is now."""
    # Written in place: a note that was cut off is no JSON, and the file is hashed again.
    with suppress(OSError):  # a full disk, a read-only folder: the file is hashed again next time
        memory.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with open(os.open(_note(file, memory), flags, 0o666), "w", encoding="utf-8") as note:
            note.write(json.dumps([_identity(file.stat()), digest]))


def stamp(status: os.stat_result) -> list[int]:
    """What changes when a file changes."""
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]


def _identity(status: os.stat_result) -> list[int]:
    """``stamp``, and the time of change that no program sets: a copy that keeps its times has another."""
    return [*stamp(status), status.st_ctime_ns]


class _CountedFile(FileIO):
    """A file that reports how much is read from it."""

    progress: Callable[[int], None]

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        self.progress(count)
        return count


def _recall(file: Path, memory: Path) -> str | None:
    try:
        remembered, digest = json.loads(_note(file, memory).read_bytes())
        return str(digest) if remembered == _identity(file.stat()) else None
    except (OSError, ValueError, RecursionError):
        return None


def _note(file: Path, memory: Path) -> Path:
    return memory / hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:32]
