"""Checkpoints that a command reads, while the run that has written them goes on: it leaves these. Imports no torch."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path

from panda.engine.checkpoints.folders import find_checkpoint
from panda.engine.checkpoints.manifest import MANIFEST
from panda.files.locks import is_at
from panda.files.whole import remove


@contextmanager
def being_read(path: Path) -> Iterator[Path | None]:
    """What ``find_checkpoint`` finds at ``path``. The run leaves it in place meanwhile, where the disk has locks."""
    while True:
        checkpoint = find_checkpoint(path)
        if checkpoint is None:
            yield None
            return
        try:
            descriptor = os.open(checkpoint / MANIFEST, os.O_RDONLY)
        except FileNotFoundError:  # removed since: there is a newer one
            continue
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            if is_at(descriptor, checkpoint / MANIFEST):
                yield checkpoint
                return
        finally:
            os.close(descriptor)


def remove_unless_read(checkpoint: Path) -> bool:
    """Remove ``checkpoint``, unless a process reads it now; whether it was removed."""
    descriptor = os.open(checkpoint / MANIFEST, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:  # a file system without locks
        pass
    try:
        remove(checkpoint)
    finally:
        os.close(descriptor)
    return True
