"""The lock of a run directory: only one process at a time writes to it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from panda.files.locks import HeldError
from panda.files.locks import held
from panda.files.locks import holder_of
from panda.registry import UserError

FILE = ".lock"


class RunLock(ExitStack):
    """Holds a run directory from ``take`` until the end of a ``with`` statement."""

    def take(self, directory: Path) -> None:
        """Hold ``directory``. Raises UserError, which says who holds it, where another process does."""
        try:
            self.enter_context(held(directory / FILE, unlocked="see that only one run at a time is in it."))
        except HeldError as problem:
            raise _at_work(directory, problem.holder) from None
        except OSError as problem:
            raise UserError(f"{directory}: cannot be written to: {problem.strerror}.") from None


def check_free(directory: Path) -> None:
    """Raise UserError where a process holds ``directory``. Holds and makes nothing."""
    if holder := holder_of(directory / FILE):
        raise _at_work(directory, holder)


def _at_work(directory: Path, holder: str) -> UserError:
    return UserError(
        f"{directory}: another run is at work in it: {holder}. Wait until it has ended, or stop it; for another run"
        " give another `output_dir`."
    )
