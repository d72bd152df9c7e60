"""What all commands share: user errors without a traceback, and exit codes."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable

from panda.configuration.launcher import forget_empty
from panda.files.private import without_secrets
from panda.files.terminal import printable
from panda.registry import UserError
from panda.run.interruption import SAVED
from panda.run.interruption import Interrupted

USAGE_ERROR = 2
BROKEN_PIPE = 128 + 13
"""The exit code of a program that SIGPIPE ended, in a shell. Not 0: a run that could not print did not finish."""


def print_version() -> None:
    """Print the version of panda."""
    import panda

    print(f"panda {panda.__version__}")


def run_command(command: Callable[[list[str]], None], argv: list[str] | None) -> int:
    """Run ``command`` on ``argv`` (by default ``sys.argv``) and return its exit code.

    A UserError is printed and gives 2; ``PANDA_TRACEBACK=1`` in the environment adds its traceback. A run that was
    interrupted and has saved gives 75. Any other exception is a bug, and keeps its traceback.
    """
    _open_what_is_closed()
    _replace_what_cannot_be_written()
    forget_empty()
    try:
        command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # here, where the error of a closed pipe is caught
    except UserError as error:
        if os.environ.get("PANDA_TRACEBACK"):
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"error on rank {rank}"
        text = printable(without_secrets(str(error)))
        print(f"{prefix}: " + "\n  ".join(text.splitlines()), file=sys.stderr)
        return USAGE_ERROR
    except Interrupted as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(printable(str(stopped)), flush=True)
        return SAVED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `panda list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return 0


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
