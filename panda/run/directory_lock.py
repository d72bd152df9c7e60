"""The lock of a run directory: only one process at a time writes to it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from panda.engine.checkpoints.in_use import being_read
from panda.files.locks import HeldError
from panda.files.locks import held
from panda.files.locks import holder_of
from panda.registry import UserError

FILE = ".lock"


class RunLock(ExitStack):
    """Holds a run directory from ``take`` to the end of the ``with`` statement, and what it begins with meanwhile."""

    _file: Path | None = None
    _identity: os.stat_result | None = None
    _reading: ExitStack | None = None

    def take(self, directory: Path) -> None:
        """Hold ``directory``. Raises UserError, which names the holder, if another process holds it."""
        try:
            self.enter_context(held(directory / FILE, unlocked="make sure that only one run at a time uses it."))
            self._file, self._identity = directory / FILE, (directory / FILE).stat()
        except HeldError as problem:
            raise _in_use(directory, problem.holder) from None
        except OSError as problem:
            raise UserError(f"{directory}: cannot be written to: {problem.strerror}.") from None

    def read(self, path: Path) -> Path | None:
        """The checkpoint at ``path``, of another run, which leaves it in place until ``have_read``; None for none."""
        self._reading = self.enter_context(ExitStack())
        return self._reading.enter_context(being_read(path))

    def have_read(self) -> None:
        """Let the other run remove what ``read`` returned."""
        if self._reading is not None:
            self._reading.close()

    def is_lost(self) -> bool:
        """Whether the directory that is held was removed since, or another stands in its place."""
        if self._file is None or self._identity is None:
            return False
        try:
            return not os.path.samestat(self._file.stat(), self._identity)
        except FileNotFoundError:
            return True
        except OSError:  # a network disk that does not answer for a while
            return False


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
