"""Checkpoints that a process reads, while the run that has written them goes on: it leaves these. Imports no torch."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from panda.engine.checkpoints.folders import drop_pointers
from panda.engine.checkpoints.folders import find_checkpoint
from panda.engine.checkpoints.folders import set_aside
from panda.engine.checkpoints.manifest import MANIFEST
from panda.engine.checkpoints.manifest import read_manifest
from panda.engine.checkpoints.manifest import replace_manifest
from panda.files.activity import stand
from panda.files.locks import POLL_SECONDS
from panda.files.locks import close
from panda.files.locks import is_at
from panda.files.locks import opened
from panda.files.terminal import printable
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
            descriptor = opened(checkpoint / MANIFEST, os.O_RDONLY)
        except FileNotFoundError:  # removed since: there is a newer one
            continue
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            if is_at(descriptor, checkpoint / MANIFEST):
                yield checkpoint
                return
        finally:
            close(descriptor)


def remove_unless_read(checkpoint: Path) -> bool:
    """Remove ``checkpoint``, unless a process reads it now; whether it was removed."""
    with _kept_from_readers(checkpoint) as is_unread:
        if is_unread:
            drop_pointers(checkpoint)
            remove(checkpoint)
    return is_unread


def set_aside_once_unread(checkpoint: Path, why: str) -> Path:
    """``set_aside``, once no process reads ``checkpoint``; says that it waits."""
    with _once_unread(checkpoint, "set aside"):
        return set_aside(checkpoint, why)


def make_lasting(checkpoint: Path) -> None:
    """Have newer checkpoints no longer replace ``checkpoint``, if it is a passing one, once no process reads it."""
    manifest = read_manifest(checkpoint)
    if manifest.passing:
        with _once_unread(checkpoint, "kept"):  # readers hold the manifest, which is replaced
            replace_manifest(checkpoint, replace(manifest, passing=False))


@contextmanager
def _once_unread(checkpoint: Path, what: str) -> Iterator[None]:
    """Goes around what is done to ``checkpoint`` once no process reads it; says that it waits to be ``what``."""
    has_said = False
    while True:
        with _kept_from_readers(checkpoint) as is_unread:
            if is_unread:
                yield
                return
        if not has_said:
            stand(f"waiting for a process that reads {checkpoint.name}")
            print(printable(f"waiting: {checkpoint} is to be {what}, and another process reads it"), flush=True)
            has_said = True
        time.sleep(POLL_SECONDS)


@contextmanager
def _kept_from_readers(checkpoint: Path) -> Iterator[bool]:
    """Whether no process reads ``checkpoint``; then none begins to meanwhile."""
    try:
        descriptor = opened(checkpoint / MANIFEST, os.O_RDWR)
    except OSError:  # it is damaged, and no process has found it
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True
    finally:
        close(descriptor)
