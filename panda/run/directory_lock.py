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
    """Holds a run directory from ``take`` to the end of the ``with`` statement."""

    def take(self, directory: Path) -> None:
        """Hold ``directory``. Raises UserError, which names the holder, if another process holds it."""
        try:
            self.enter_context(held(directory / FILE, unlocked="make sure that only one run at a time uses it."))
        except HeldError as problem:
            raise _in_use(directory, problem.holder) from None
        except OSError as problem:
            raise UserError(f"{directory}: cannot be written to: {problem.strerror}.") from None


def is_in_use(directory: Path) -> bool:
    """Whether a process holds ``directory``. Creates and holds nothing."""
    return holder_of(directory / FILE) is not None


def check_free(directory: Path) -> None:
    """Raise UserError if a process holds ``directory``. Creates and holds nothing."""
    if holder := holder_of(directory / FILE):
        raise _in_use(directory, holder)


def _in_use(directory: Path, holder: str) -> UserError:
    return UserError(
        f"{directory}: another run is using it: {holder}. Wait for it to end, or stop it; for a separate run,"
        " choose another `output_dir`."
    )
