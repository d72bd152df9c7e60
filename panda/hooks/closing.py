"""Plugins that open a file or a connection, and close it when the run ends."""

from __future__ import annotations

from typing import Any
from typing import Generic
from typing import TypeVar

from panda.registry import hookimpl

Opened = TypeVar("Opened")


class Closing(Generic[Opened]):
    """Closes what it has opened, once, at the end of the run or where an exception ends it."""

    acts = False  # it only watches
    opened: Opened | None = None
    """None before it is opened, when it is closed, and on ranks that open nothing."""

    def close(self, opened: Any, *, failed: bool) -> None:
        """Close what was ``opened``. ``failed``: an exception ends the run."""
        opened.close()

    @hookimpl
    def panda_run_end(self) -> None:
        self._close(failed=False)

    @hookimpl
    def panda_exception(self) -> None:
        self._close(failed=True)

    def _close(self, *, failed: bool) -> None:
        opened, self.opened = self.opened, None
        if opened is not None:
            self.close(opened, failed=failed)
