"""A full disk, in words. Libraries report it in ways of their own, some of them without a word of it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from panda.registry import UserError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No room, no quota, and a file that may not grow."""


@contextmanager
def writing(what: str, then: str) -> Iterator[None]:
    """Where the body fails because the disk is full, raise UserError; all other errors pass.

    It says: ``WHAT cannot be written: the disk is full. THEN``.
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
    """Words for a full disk, with the file where it is known, if that is why ``error`` was raised; otherwise None."""
    if error is None:
        return None
    file = (error.filename2 or error.filename) if isinstance(error, OSError) else None  # the target of a copy
    at = f" ({file})" if file else ""
    number = getattr(error, "errno", None)
    if number is None and (given := re.search(r"\((?:os error|Errno) (\d+)\)|\[Errno (\d+)\]", str(error))):
        number = int(given[1] or given[2])  # in the messages of safetensors and shutil
    if number in _NO_ROOM:
        return f"the disk is full{at}"
    if found := disk_full(error.__cause__ or error.__context__):
        return found
    if isinstance(error, RuntimeError) and "inline_container" in str(error):  # torch.save does not give the reason
        return "the disk is full, or fails"
    return None
