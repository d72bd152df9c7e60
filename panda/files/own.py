"""What panda may write over or read from: inside a folder of its own, and of whom it trusts.

A folder can come from somebody else, or lie where others may write: a link in it could lead to what is not panda's.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from panda.registry import UserError


def refuse_links_out(folder: Path) -> None:
    """Raise UserError where a link in ``folder``, or below, leads out of it: what is written there would go elsewhere.

    ``folder`` itself may be a link.
    """
    inside = folder.resolve()
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                raise UserError(
                    f"{path}: it is a link to {os.readlink(path)}, outside of {folder}, and panda writes only inside."
                    " Move the link away, and what it leads to in its place. To keep a whole run on another disk, name"
                    " a folder there with `output_dir`, or make the run directory itself the link."
                )


def refuse_others(folder: Path, patterns: Collection[str], marks: Collection[str], what: str) -> None:
    """Raise UserError where ``folder``, which is going to be replaced, is not ``what`` panda wrote.

    That has one of the files ``marks``, and only names that match ``patterns``.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    strange = [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)]
    if not folder.is_dir() or strange or (names and not set(marks) & set(names)):
        found = f"it holds {strange[0]!r}" if strange else "it is something else"
        raise UserError(
            f"{folder}: {what} would replace it, and {found}, which panda did not write. Move it away, then start"
            " again."
        )


def refuse_strangers(entry: Path, folder: Path, option: str) -> None:
    """Raise UserError where ``entry`` of ``folder``, in which everybody may write, is of somebody who is not trusted.

    Trusted are this user, root, and the owner of ``folder``, who shares it. A link is refused in any case.
    """
    if entry.is_symlink():
        raise UserError(
            f"{option}: {entry} is a link, and panda follows none in a cache, where it replaces and removes folders."
            " Remove the link."
        )
    try:
        own, shared = entry.stat(), folder.stat()
    except OSError:  # it is not there
        return
    trusted = {os.geteuid(), 0, shared.st_uid}
    anyone = [status.st_mode & stat.S_IWOTH for status in (own, shared)]
    if anyone[0] or (anyone[1] and own.st_uid not in trusted):
        whose = "everybody may write into it" if anyone[0] else f"it belongs to the user with the number {own.st_uid}"
        raise UserError(
            f"{option}: {entry}: {whose}, and everybody may write into {folder}: its data could be anybody's. Name"
            f" another folder, or let only your group write: `chmod o-w`."
        )
