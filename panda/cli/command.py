"""What all commands share: user errors without a traceback, and exit codes."""

from __future__ import annotations

import atexit
import functools
import gc
import io
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from panda.configuration.launcher import AnotherRankError
from panda.configuration.launcher import LostRankError
from panda.configuration.launcher import forget_empty
from panda.configuration.launcher import tell_launcher
from panda.files.disk_full import disk_full
from panda.files.disk_full import is_of_files
from panda.files.disk_full import out_of_reach
from panda.files.disk_full import remedy
from panda.files.library_warnings import LibraryWarnings
from panda.files.library_warnings import kept_aside
from panda.files.library_warnings import show_last
from panda.files.private import without_secrets
from panda.files.terminal import printable
from panda.registry import UserError
from panda.run.interruption import SAVED
from panda.run.interruption import Interrupted

USAGE_ERROR = 2
ANOTHER_FAILED = 1
"""The exit code of a rank that ends because of another one."""
RANK_0_SECONDS = 2.0
"""Seconds in which rank 0 finds the same mistake, and its launcher ends the others."""
BROKEN_PIPE = 128 + 13
"""The exit code of a program that SIGPIPE ended, in a shell. Not 0: a run that could not print did not finish."""
PLACES = "Folders are named by `output_dir`, `token_cache` and TMPDIR."
"""Where no command has said what it was writing."""


def print_version() -> None:
    """Print the version of panda."""
    import panda

    print(f"panda {panda.__version__}")


def run_command(command: Callable[[list[str]], None], argv: list[str] | None) -> int:
    """Run ``command`` on ``argv`` (by default ``sys.argv``) and return its exit code.

    A UserError is printed and gives 2; ``PANDA_TRACEBACK=1`` in the environment adds its traceback. A run that was
    interrupted and has saved gives 75, a rank that ends because of another one 1. Errors of disks that are full,
    failing or read-only, and of files that are out of reach, are the user's, too. Any other exception is a bug, and
    keeps its traceback.
    """
    _open_what_is_closed()
    _replace_what_cannot_be_written()
    _end_soon()
    forget_empty()
    with kept_aside() as kept:
        return _run(command, argv, kept)


def _run(command: Callable[[list[str]], None], argv: list[str] | None, kept: LibraryWarnings) -> int:
    try:
        command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # here, where the error of a closed pipe is caught
    except AnotherRankError:
        _end_now(ANOTHER_FAILED)
    except UserError as error:
        if error.is_said:
            return USAGE_ERROR
        if os.environ.get("PANDA_TRACEBACK"):
            traceback.print_exc()
        _print_error(str(error))
        if isinstance(error, LostRankError):
            _end_now(USAGE_ERROR)
        return USAGE_ERROR
    except Interrupted as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(printable(str(stopped)), flush=True)
        return SAVED
    except KeyboardInterrupt:
        return interrupted()
    except BrokenPipeError:  # `panda list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        full, away = disk_full(error), out_of_reach(error)
        show_last(kept)  # also of a file out of reach: what wanted it may have said why
        if not (full or away) or os.environ.get("PANDA_TRACEBACK"):
            tell_launcher(printable(without_secrets(f"{type(error).__name__}: {error}")))
            raise
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", []))
        where = f"{notes}\nPANDA_TRACEBACK=1 shows who wanted it."
        places = f" {PLACES}" if full and is_of_files(full) else ""
        _print_error(f"{full}. {remedy(full)}{places}" if full else f"{away}.{where}")
        return USAGE_ERROR
    return 0


def interrupted() -> int:
    """Say that Ctrl-C has ended the command, and return the exit code of that."""
    print("interrupted", file=sys.stderr)
    return 130


def _end_now(code: int) -> NoReturn:
    """End this process without the end of the interpreter, where libraries would wait for ranks that are gone."""
    sys.stdout.flush()
    os._exit(code)


def _print_error(text: str) -> None:
    rank = os.environ.get("RANK", "0")
    if rank != "0" and "panda.engine.meeting" not in sys.modules:
        # The ranks have not met. Most mistakes are every rank's: launchers end this one as soon as rank 0 has said it.
        time.sleep(RANK_0_SECONDS)
    prefix = "error" if rank == "0" else f"error on rank {rank}"
    shown = printable(without_secrets(text))
    print(f"{prefix}: " + "\n  ".join(shown.splitlines()), file=sys.stderr, flush=True)
    tell_launcher(shown)


@functools.cache
def _end_soon() -> None:
    """Let the interpreter end without looking for garbage among a million objects of torch: 0.4 s instead of 3.

    It does so several times at its end (CPython 3.11). What registers later for the end, as libraries do, runs earlier.
    """
    atexit.register(gc.freeze)


def _open_what_is_closed() -> None:
    """Let what is printed go nowhere where stdout or stderr is closed, as under some schedulers: ``>&-``."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)  # libraries and children write to the descriptor
            setattr(sys, name, os.fdopen(os.dup(number), "w", encoding="utf-8"))


def _replace_what_cannot_be_written() -> None:
    """Let the standard streams write ``\\u7af9`` for a character that their encoding lacks, instead of failing.

    A run must not end with a traceback because of a character of its data. An error handler that the user chose, as in
    ``PYTHONIOENCODING=ascii:replace``, stays.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
