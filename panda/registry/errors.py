"""The one exception that a user sees without a traceback."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk: no room, no quota, a file that may not grow."""


class UserError(Exception):
    """An error that the user can correct.

    The text says what was given, what was expected and what to do. The command line prints it
    without a traceback and exits with 2; anything else that is raised is a bug and keeps its own.
    """


def in_brief(problem: Exception, most: int = 300) -> str:
    """The message of ``problem`` on one line, without the full stop; cut after ``most`` characters.

    Some libraries list all that they know.
    """
    text = " ".join(str(problem).split())
    return text.rstrip(".") if len(text) <= most else f"{text[:most]}..."


@contextmanager
def writing(what: str, then: str) -> Iterator[None]:
    """Raise UserError, ``WHAT cannot be written: the disk is full. THEN``, where the disk is full inside."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        problem = _no_room(error)
        if problem is None:
            raise
        raise UserError(f"{what} cannot be written: {problem}. {then}") from error


def _no_room(error: BaseException | None) -> str | None:
    """In words, that ``error``, or an error that it came from, is that of a full disk; None where it is not."""
    if error is None:
        return None
    file = (error.filename2 or error.filename) if isinstance(error, OSError) else None  # of a copy, its target
    at = f" ({file})" if file else ""
    number = getattr(error, "errno", None)
    if number is None and (told := re.search(r"\((?:os error|Errno) (\d+)\)|\[Errno (\d+)\]", str(error))):
        number = int(told[1] or told[2])  # as safetensors and shutil say it
    if number in NO_ROOM:
        return f"the disk is full{at}"
    if found := _no_room(error.__cause__ or error.__context__):
        return found
    if isinstance(error, RuntimeError) and "inline_container" in str(error):  # torch.save keeps the reason to itself
        return "the disk is full, or fails"
    return None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'a' or 'b'?` for the names nearest to ``name``; empty where none is near."""
    spelling = {known_name.lower(): known_name for known_name in known}
    near = [spelling[match] for match in difflib.get_close_matches(name.lower(), spelling, n=3, cutoff=0.6)]
    return f" Did you mean {' or '.join(repr(match) for match in near)}?" if near else ""
