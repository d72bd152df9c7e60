"""The lock of a run directory: of the processes that would write to it at once, one does.

It is the system's file lock, which is freed however its holder dies; the file stays, and means nothing.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
import weakref
from contextlib import suppress
from datetime import UTC
from datetime import datetime
from pathlib import Path

from panda.registry import UserError

FILE = ".lock"
LOOKS, BETWEEN = 10, 0.05
"""How often a lock that is held is looked at, and seconds between: who only looks holds it for an instant, too."""


class RunLock:
    """Keeps one run directory for this process; frees it at the end of a ``with`` statement."""

    def __init__(self) -> None:
        self.descriptor: int | None = None
        _locks.add(self)

    def take(self, directory: Path) -> None:
        """Hold ``directory``. Raises UserError that says who holds it, where another process does."""
        assert self.descriptor is None
        try:
            descriptor = os.open(directory / FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as problem:
            raise UserError(f"{directory}: cannot be written to: {problem.strerror}.") from None
        for look in range(LOOKS):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if look < LOOKS - 1:
                    time.sleep(BETWEEN)
                    continue
                holder = _holder(descriptor)
                os.close(descriptor)
                raise _held(directory, holder) from None
            except OSError as problem:  # a file system that has no locks
                print(
                    f"note: {directory}: cannot be locked ({problem.strerror}): see that one run at a time is in it.",
                    file=sys.stderr,
                )
                break
        self.descriptor = descriptor
        since = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.descriptor is not None:
            with suppress(OSError):
                os.truncate(self.descriptor, 0)
            self._close()

    def _close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def check_free(directory: Path) -> None:
    """Raise UserError where a process holds ``directory``. Holds and makes nothing."""
    try:
        descriptor = os.open(directory / FILE, os.O_RDONLY)
    except OSError:  # nobody has been there, or it is told when it is to be held
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held(directory, _holder(descriptor)) from None
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"


def _held(directory: Path, holder: str) -> UserError:
    return UserError(
        f"{directory}: another run is at work in it: {holder}. Wait until that has ended, or stop it; for another run"
        " name another `output_dir`."
    )


_locks: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """A process that is forked, to prepare batches, shares the lock, and would hold it on when its parent is killed."""
    for lock in _locks:
        lock._close()


os.register_at_fork(after_in_child=_leave_to_parent)
