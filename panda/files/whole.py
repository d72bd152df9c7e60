"""Files and folders that are there whole or not at all.

Each is made under another name beside its own, written through to the disk, and renamed. A file is replaced in that
instant. A folder that is replaced is renamed as well: between the two renames nothing has its name.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path


def aside(path: Path) -> Path:
    """The name under which ``path`` is made."""
    return path.with_name(f".tmp-{path.name}")


@contextmanager
def whole(path: Path, *, alone: bool = True) -> Iterator[Path]:
    """Yields the path of a file or folder to make, which becomes ``path``, in place of what was there, at the end.

    Where that fails, what was there stays and nothing else is left. What a process that was killed left is removed by
    the next one. Without ``alone`` several processes may make it at the same time: of files the last one stays, and
    where there is a folder already OSError is raised.
    """
    path = path.resolve()  # a link, say to a larger disk, stays a link
    new = aside(path) if alone else aside(path).with_name(f".tmp-{path.name}-{secrets.token_hex(8)}")
    if alone:
        _discard(new)
    try:
        yield new
        put(new, path, replace_folder=alone)
    except BaseException:
        _discard(new)  # it may take room that is needed
        raise


def write_whole(path: Path, text: str) -> None:
    """Make ``path`` a file of ``text``, in place of the one that was there."""
    with whole(path) as new:
        new.write_text(text, encoding="utf-8")


def put(new: Path, path: Path, *, replace_folder: bool = True) -> None:
    """Give ``new``, a file or folder beside ``path``, that name, once all of it is on the disk.

    When this returns the renaming is on the disk, too. Where the renaming fails, what had the name has it still.
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
    """Remove ``folder``, which loses its name before it loses a file."""
    os.replace(folder, aside(folder))
    shutil.rmtree(aside(folder))


def sync(path: Path) -> None:
    """Have the system write the file or folder ``path`` to the disk before this returns."""
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
