"""Recognises the errors of a disk that is full, failing or read-only, and of files that are out of reach.

Each library reports them in its own way, some without saying so.
"""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from panda.registry import UserError

_STATES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk is full",  # for this user
    errno.EFBIG: "the disk is full",  # a file may not grow
    errno.EIO: "the disk is failing (input/output error)",
    errno.EROFS: "the disk can only be read (read-only file system)",
    errno.ESTALE: "the network disk has lost it (stale file handle)",
    errno.ENXIO: "the disk has gone",
    errno.ENODEV: "the disk has gone",
    errno.ENOTCONN: "the network disk is not connected",
}
"""What each error says of the disk. A terminal that is gone gives EIO, too, without the name of a file."""
PRINTED = "what is printed cannot be written"
_REMEDIES = {
    PRINTED: "Send stdout and stderr to another place.",
    "the disk is full or failing": "Make room; if there is room, `dmesg` may say what the disk lacks.",
    "the disk is full": "Make room, or name a folder on another disk.",
    "the disk is failing": "Name a folder on another disk; `dmesg` may say what is wrong with this one.",
    "the disk can only be read": "Mount it so that it can be written to, or name a folder on another disk.",
    "the disk has gone": "Connect it again, or name a folder on another disk.",
    "the network disk": "Connect it again, or name a folder on another disk.",
}
"""What to do, by the beginning of what is wrong."""
_OUT_OF_REACH = {
    errno.EACCES: "this user may not read or enter it (permission denied)",
    errno.EPERM: "this user may not do that (operation not permitted)",
    errno.ENAMETOOLONG: "the name is too long for this file system",
    errno.ELOOP: "links that lead to each other",
}
LONGEST_NAME = 200
"""Characters of a name in a message."""
_NUMBER = re.compile(r"\((?:os error|Errno) (\d+)\)|\[Errno (\d+)\]|: [A-Z][A-Za-z ]+ \((\d+)\)")
"""How the texts of the errors of safetensors, shutil and torch have it."""
SHARED_MEMORY = "/dev/shm"
_OF_SHARED_MEMORY = re.compile(r"/dev/shm|</?torch_|shared memory|out of shared")

_THIS_MEMORY = f"{SHARED_MEMORY}, the shared memory of this machine or container"
SHARED_MEMORY_FULL = f"{_THIS_MEMORY}, is full"
MORE_SHARED_MEMORY = (
    "Processes that prepare batches need it, and ranks on GPUs of one machine. Enlarge it (`docker run --shm-size 8g`,"
    " `mount -o remount,size=8g /dev/shm`), or write `num_workers: 0`."
)


@contextmanager
def writing(what: str, then: str) -> Iterator[None]:
    """If the body fails because of the disk (``disk_full``), raise UserError; all other errors pass.

    The message is ``WHAT cannot be written: the disk is full. Make room. THEN``, for another problem with what helps
    against that. Where shared memory is full, or what is printed finds no room, it is about that.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        problem = disk_full(error)
        if problem is None:
            raise
        if not is_of_files(problem):
            raise UserError(f"{problem}. {remedy(problem)}") from error
        raise UserError(f"{what} cannot be written: {problem}. {remedy(problem)} {then}".rstrip()) from error


def remedy(problem: str) -> str:
    """A sentence: what to do about ``problem``, as ``disk_full`` calls it. Only of a full disk does room help."""
    if problem.startswith(_THIS_MEMORY):
        return MORE_SHARED_MEMORY
    return next(what for state, what in _REMEDIES.items() if problem.startswith(state))


def is_of_files(problem: str) -> bool:
    """Whether ``problem``, as ``disk_full`` calls it, is of files, and neither of shared memory nor of stdout."""
    return not problem.startswith((_THIS_MEMORY, PRINTED))


def disk_full(error: BaseException | None) -> str | None:
    """Text that says that the disk is full, failing or read-only, with the file if known, if ``error`` means that.

    Else None. Shared memory is a disk, too, and named.
    """
    if error is None:
        return None
    file = (error.filename2 or error.filename) if isinstance(error, OSError) else None  # the target of a copy
    at = f" ({file})" if file else ""
    number = getattr(error, "errno", None)
    if number is None and (given := _NUMBER.search(str(error))):
        number = int(next(filter(None, given.groups())))  # only in the text
    if number in _STATES:
        if _is_of_shared_memory(error, file):
            return SHARED_MEMORY_FULL if _STATES[number] == "the disk is full" else f"{_THIS_MEMORY}: {_STATES[number]}"
        return f"{PRINTED}: {_STATES[number]}" if not file and _is_of_printing(error) else f"{_STATES[number]}{at}"
    if found := disk_full(error.__cause__ or error.__context__):
        return found
    # torch.save (2.13, 2026-11) does not give the reason. This can go when it raises OSError.
    if isinstance(error, RuntimeError) and "inline_container" in str(error):
        return "the disk is full or failing"
    return None


def out_of_reach(error: BaseException) -> str | None:
    """Text that says why a file cannot be reached, with its name, if ``error`` means that: it is forbidden, say.

    Folders that a command walks through may have such files: nobody has named them, and no check can come before.
    """
    if not isinstance(error, OSError) or error.errno not in _OUT_OF_REACH or error.filename is None:
        return None
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    return f"{name if len(name) <= LONGEST_NAME else f'{name[:LONGEST_NAME]}...'}: {_OUT_OF_REACH[error.errno]}"


def _is_of_printing(error: BaseException) -> bool:
    """Whether ``error``, which names no file, came out of printing: C code, which raises it, has no frame."""
    frames = traceback.extract_tb(error.__traceback__)
    line = (frames[-1].line or "") if frames else ""
    return re.search(r"\b(print\(|stdout\.)", line) is not None


def _is_of_shared_memory(error: BaseException, file: object) -> bool:
    """Whether ``error`` is of shared memory: by its text, as torch's, or since it made a semaphore."""
    if _OF_SHARED_MEMORY.search(f"{file or ''} {error}"):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return file is None and bool(frames) and frames[-1].filename.endswith("multiprocessing/synchronize.py")
