"""Recognises the errors of a full or failing disk. Each library reports it in its own way, some without saying so."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from panda.registry import UserError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No room, no quota, and a file that may not grow."""
_FAILING = (errno.EIO, errno.EROFS, errno.ESTALE, errno.ENXIO, errno.ENODEV)
"""A disk that fails, can only be read (as one is mounted again after it failed), or has gone."""


@contextmanager
def writing(what: str, then: str) -> Iterator[None]:
    """If the body fails because the disk is full or fails, raise UserError; all other errors pass.

    The message is ``WHAT cannot be written: the disk is full. THEN``.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        problem = disk_full(error)
        if problem is None:
            raise
        raise UserError(f"{what} cannot be written: {problem}. {then}") from error


def disk_full(error: BaseException | None) -> str | None:
    """Text that says that the disk is full or fails, with the file if known, if ``error`` means that; else None."""
    if error is None:
        return None
    file = (error.filename2 or error.filename) if isinstance(error, OSError) else None  # the target of a copy
    at = f" ({file})" if file else ""
    number = getattr(error, "errno", None)
    if number is None and (given := re.search(r"\((?:os error|Errno) (\d+)\)|\[Errno (\d+)\]", str(error))):
        number = int(given[1] or given[2])  # only in the text of safetensors' and shutil's errors
    if number in _NO_ROOM:
        return f"the disk is full{at}"
    if number in _FAILING:
        return f"the disk fails{at}: {os.strerror(number)}"
    if found := disk_full(error.__cause__ or error.__context__):
        return found
    # torch.save (2.13, 2026-11) does not give the reason. This can go when it raises OSError.
    if isinstance(error, RuntimeError) and "inline_container" in str(error):
        return "the disk is full or failing"
    return None
