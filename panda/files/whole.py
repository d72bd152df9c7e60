"""Files and folders that are complete or absent.

Each is written under a temporary name in the same folder, synced to the disk, and renamed. A file is replaced
atomically. A folder that is replaced is renamed first, so for an instant nothing has its name.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path

from panda.registry import UserError


def aside(path: Path) -> Path:
    """The temporary name under which ``path`` is written."""
    return path.with_name(f".tmp-{path.name}")


@contextmanager
def whole(path: Path, *, alone: bool = True) -> Iterator[Path]:
    """Yields the path of a file or folder to write, which replaces ``path`` at the end of the ``with`` statement.

    If that fails, ``path`` is left as it was, and nothing else is left. What a killed process left is removed by the
    next one. Without ``alone``, several processes may write ``path`` at the same time: of files the last one stays;
    for a folder that exists already, raises OSError.
    """
    path = path.resolve()  # a link, say to a larger disk, stays a link
    new = aside(path) if alone else aside(path).with_name(f".tmp-{path.name}-{secrets.token_hex(8)}")
    if alone:
        _discard(new)
    try:
        yield new
        put(new, path, replace_folder=alone)
    except BaseException:
        _discard(new)  # it may take up space that is needed
        raise


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to the file ``path``, in place of any that is there."""
    with whole(path) as new:
        new.write_text(text, encoding="utf-8")


def put(new: Path, path: Path, *, replace_folder: bool = True) -> None:
    """Rename ``new``, a file or folder beside ``path``, to ``path``, after all of it is synced to the disk.

    The rename itself is synced before this returns. If it fails, what was at ``path`` is still there.
    """
    for each in (*(new.rglob("*") if new.is_dir() else ()), new):
        if not each.is_symlink():
            sync(each)
    old = path.with_name(f".tmp-old-{path.name}")
    if new.is_dir() and path.is_dir() and replace_folder:
        _discard(old)
        os.replace(path, old)
        try:
            os.replace(new, path)
        except BaseException:
            os.replace(old, path)
            raise
    else:
        os.replace(new, path)
    try:
        sync(path.parent)
    finally:
        _discard(old)


def remove(folder: Path) -> None:
    """Remove ``folder``. It is renamed first, so that nobody finds it with files missing."""
    os.replace(folder, aside(folder))
    shutil.rmtree(aside(folder))


def check_can_be_made(path: Path, option: str) -> None:
    """Raise UserError, about ``option``, if ``path`` does not exist and nothing can be made there. Leaves no trace."""
    there = path.absolute()
    try:
        while not there.exists():
            if there.is_symlink():
                raise UserError(
                    f"{option}: cannot make {str(path)!r}: {there} is a link to {os.readlink(there)}, which does not"
                    " exist. Make that folder, or name another."
                )
            there = there.parent
        if there != path.absolute() and there.is_dir():
            os.rmdir(tempfile.mkdtemp(prefix=".tmp-", dir=there))  # os.access does not know every reason
    except OSError as problem:
        raise UserError(f"{option}: cannot make {str(path)!r}: {there}: {problem.strerror}.") from None
    if there != path.absolute() and not there.is_dir():
        raise UserError(f"{option}: cannot make {str(path)!r}: {there} is a file.")


def sync(path: Path) -> None:
    """Sync the file or folder ``path`` to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
