"""Locks between processes. The operating system frees them when their holder ends, however it ends.

A lock's file stays after the lock is freed; while the lock is held, the file names the holder.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from datetime import UTC
from datetime import datetime
from pathlib import Path

TRIES, SECONDS_BETWEEN = 10, 0.05
"""How often a lock is tried before it counts as held: ``holder_of`` also holds it for an instant."""
POLL_SECONDS = 0.2
"""Seconds between two tries of a process that waits."""

_TO_HOLD = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
"""Not through a link: what it leads to would be emptied."""
_descriptors: set[int] = set()
"""Open files of the locks that this process holds or waits for."""


class HeldError(Exception):
    """A lock is held by another process."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder
        """A description of that process."""


@contextmanager
def held(
    file: Path,
    *,
    waiting: Callable[[str], None] | None = None,
    unlocked: str | None = None,
    removed: bool = False,
) -> Iterator[bool]:
    """Hold the lock ``file``, which is created if missing. It excludes other threads of this process, too.

    If another process holds it, raises HeldError; or, with ``waiting``, calls that once with a description of the
    holder, and waits for the lock. Raises OSError if the file cannot be opened. Yields whether the lock is held: on a
    file system without locks it is not, and a note with ``unlocked``, which says what the user has to do, is printed.
    With ``removed`` the file is removed at the end; then all who hold it have to say so.
    """
    process = os.getpid()
    descriptor = opened(file, _TO_HOLD)
    try:
        while True:
            is_held = _lock(descriptor, file, waiting, unlocked)
            if not (removed and is_held) or is_at(descriptor, file):
                break
            close(descriptor)  # who held it before has removed it
            descriptor = opened(file, _TO_HOLD)
        with suppress(OSError):  # a full disk: the lock is held all the same
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _this_process().encode(), 0)
        try:
            yield is_held
        finally:
            if os.getpid() == process:
                with suppress(OSError):
                    os.ftruncate(descriptor, 0)
                    if removed and is_held:
                        file.unlink()  # while it is held
    finally:
        if os.getpid() == process:  # a forked process has closed it already
            close(descriptor)


def is_at(descriptor: int, file: Path) -> bool:
    """Whether the open file ``descriptor`` still is what the path ``file`` leads to."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except OSError:
        return False


def opened(file: Path, flags: int) -> int:
    """A descriptor of ``file`` that can be locked. Processes that are forked meanwhile do not hold the lock."""
    descriptor = os.open(file, flags, 0o666)
    _descriptors.add(descriptor)
    return descriptor


def close(descriptor: int) -> None:
    """Close what ``opened`` returned, which frees its lock."""
    _descriptors.discard(descriptor)
    os.close(descriptor)


def holder_of(file: Path) -> str | None:
    """A description of the process that holds the lock ``file``; None if none does, or if that cannot be known."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _written_in(descriptor)
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)
    return None


def _lock(descriptor: int, file: Path, waiting: Callable[[str], None] | None, unlocked: str | None) -> bool:
    tries = 0
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            tries += 1
            if tries == TRIES:
                if waiting is None:
                    raise HeldError(_written_in(descriptor)) from None
                waiting(_written_in(descriptor))
            time.sleep(SECONDS_BETWEEN if tries < TRIES else POLL_SECONDS)
        except OSError as problem:  # a file system without locks
            if unlocked is not None:
                print(f"note: {file.parent}: cannot be locked ({problem.strerror}): {unlocked}", file=sys.stderr)
            return False


def _this_process() -> str:
    rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
    since = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()}{rank}, since {since}"


def _written_in(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"


def _leave_to_parent() -> None:
    """Close the locks in a process that was just forked, say to prepare batches.

    It shares them with its parent, and would still hold them after the parent is killed.
    """
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
