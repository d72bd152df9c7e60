"""What libraries warn of: kept in a file of the run, or in memory, instead of between the lines that a user reads.

Python's warnings and records of ``logging`` are a library's by the file that they name and by that of the code that
warns, which ``stacklevel`` and helpers of libraries make differ. Those of packages with components for panda, and of
files of the user, are shown as always, and so are errors of libraries.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any
from typing import TextIO

from panda.files.terminal import number_of
from panda.files.terminal import printable

DEBUG = "PANDA_DEBUG"
"""Of the environment: where it is set, everything is also shown as it comes."""
LAST = 20
"""Warnings that are shown with an error that is no user's."""
HELPERS = ("logging.py", "_logging.py", "logger.py", "warnings.py")
"""Names of files in which libraries pass on what is warned of elsewhere."""
CAPTURED = "py.warnings"
"""The logger of ``logging.captureWarnings``."""
TIME = "%Y-%m-%d %H:%M:%S"
_OF_ANOTHER_RANK = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  rank (\d+)  (?![\d,]+ times: )")


class LibraryWarnings:
    """The warnings of libraries in one command."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """How often each text has come, in the order in which they came first."""
        self.owners: Counter[str] = Counter()
        """Warnings by library."""
        self.file: Path | None = None
        self.said = False
        """Whether the user knows of them."""
        self.begun = time.strftime(TIME)

    def add(self, owner: str, text: str) -> None:
        """Note a warning of the library ``owner``. A text that comes again is only counted."""
        self.owners[owner] += 1
        self.counts[text] += 1
        self.said = False
        if self.counts[text] == 1:
            self._write(text)

    def keep_in(self, file: Path) -> None:
        """From now on, write into ``file``, also what has come until now. It is made when there is something."""
        self.file = file
        for text in self.counts:
            self._write(text)

    def summary(self) -> str:
        """How many there are, of which libraries, and how many other ranks had; empty where there are none."""
        total, others = sum(self.owners.values()), self._of_other_ranks()
        names = [name for name, _ in self.owners.most_common()]
        listed = " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
        found = [f"{number_of(total, 'warning')} of {listed}"] if total else []
        found += [f"{number_of(others, 'warning')} of other ranks"] if others else []
        return ", and ".join(found)

    def _of_other_ranks(self) -> int:
        """How many texts other ranks have written into the file since this process began."""
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines() if self.file is not None else []
        except (OSError, UnicodeDecodeError):
            return 0
        found = filter(None, map(_OF_ANOTHER_RANK.match, lines))
        return sum(each[1] >= self.begun and each[2] != os.environ.get("RANK", "0") for each in found)

    def close(self) -> None:
        """Write how often the texts came that came more than once."""
        for text, count in self.counts.items():
            if count > 1:
                self._write(f"{count:,} times: {text.splitlines()[0]}")

    def _write(self, text: str) -> None:
        if self.file is None:
            return
        rank = os.environ.get("RANK", "0")
        head = time.strftime(TIME) + (f"  rank {rank}" if rank != "0" else "")
        # The folder may be gone, or on a full disk: no reason to end a run.
        with contextlib.suppress(OSError), self.file.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{head}  {text.rstrip()}\n")


_outside = LibraryWarnings()
_current = _outside


def are_kept_aside() -> bool:
    """Whether this process is in a command that keeps them."""
    return _current is not _outside


def current() -> LibraryWarnings:
    """Those of the command, or of the run, that this process is in."""
    return _current


@contextlib.contextmanager
def kept_aside() -> Iterator[LibraryWarnings]:
    """Keep what libraries warn of from the screen in the meantime, and give it."""
    global _current
    ours, before = LibraryWarnings(), _current
    show, emit = warnings.showwarning, logging.StreamHandler.emit

    def show_or_keep(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        owner = _owner(filename, _issuer())
        if owner is not None and file is None:
            ours.add(owner, f"{filename}:{lineno}: {category.__name__}: {message}")
        if owner is None or file is not None or DEBUG in os.environ:
            show(message, category, filename, lineno, file, line)

    def emit_or_keep(handler: logging.StreamHandler[Any], record: logging.LogRecord) -> None:
        owner = _owner(*_files_of(record)) if _is_console(handler) else None
        if owner is not None:
            with contextlib.suppress(Exception):  # the library's own mistake in its format
                ours.add(owner, f"{record.pathname}:{record.lineno}: {record.levelname}: {record.getMessage()}")
        if owner is None or record.levelno >= logging.ERROR or DEBUG in os.environ:
            emit(handler, record)

    _current = ours
    warnings.showwarning = show_or_keep
    logging.StreamHandler.emit = emit_or_keep  # type: ignore[method-assign, assignment]
    try:
        yield ours
    finally:
        _current = before
        logging.StreamHandler.emit = emit  # type: ignore[method-assign]
        if warnings.showwarning is show_or_keep:
            warnings.showwarning = show
        elif getattr(logging, "_warnings_showwarning", None) is show_or_keep:  # what captureWarnings gives back
            logging._warnings_showwarning = show  # type: ignore[attr-defined]
        ours.close()


def show_last(kept: LibraryWarnings) -> None:
    """Print the last of ``kept`` on stderr: they may explain an error."""
    if kept.counts and DEBUG not in os.environ:
        print(f"{kept.summary()} before this error, which may explain it:", file=sys.stderr)
        for text in [*kept.counts][-LAST:]:
            print(f"  {printable(text)}", file=sys.stderr)


def _owner(*files: str) -> str | None:
    """The library that warns in the first of ``files``; None where one of them is of a package with components for
    panda, or of a user."""
    owners = [owner_of(file) for file in files]
    return None if None in owners else owners[0]


def _issuer() -> str:
    """The file of the code that warns or logs now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _passes_on(frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_code.co_filename if frame else __file__


def _passes_on(file: str) -> bool:
    if file == __file__ or file.startswith(os.path.dirname(logging.__file__) + os.sep):
        return True
    return os.path.basename(file) in HELPERS and owner_of(file) is not None


def _files_of(record: logging.LogRecord) -> list[str]:
    """The files by which ``record`` is somebody's: the one that it names, that of the code that logs, and the module
    after which its logger is called."""
    module = sys.modules.get(record.name) if record.name != "__main__" else None
    named = [file] if (file := getattr(module, "__file__", None)) else []
    if record.name != CAPTURED:
        return [record.pathname, _issuer(), *named]
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:  # the file that the warning names, of which the record has only the text
        if isinstance(message := frame.f_locals.get("msg"), warnings.WarningMessage):
            return [message.filename, _issuer()]
        frame = frame.f_back
    return [record.pathname, _issuer()]


def owner_of(filename: str) -> str | None:
    """The library that a file is part of; None for those of a package with components for panda, or of a user."""
    path = os.path.abspath(filename)
    for folder in _installed():
        if path.startswith(folder + os.sep):
            name = path[len(folder) + 1 :].split(os.sep)[0].partition(".")[0]
            if name not in ("site-packages", "dist-packages"):
                return None if name in _with_components() else name
    if path.startswith(_own() + os.sep):
        return "panda"
    return "Python" if filename.startswith("<frozen") or path.startswith(_standard() + os.sep) else None


def _is_console(handler: logging.StreamHandler[Any]) -> bool:
    stream = handler.stream
    known = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return any(stream is each for each in known) or getattr(stream, "name", None) in ("<stdout>", "<stderr>")


@cache
def _installed() -> tuple[str, ...]:
    """The folders of installed packages."""
    named = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    found = [each for each in sys.path if Path(each).name in ("site-packages", "dist-packages")]
    return tuple(dict.fromkeys(os.path.abspath(each) for each in (*named, *found)))


@cache
def _standard() -> str:
    return os.path.abspath(sysconfig.get_path("stdlib"))


@cache
def _own() -> str:
    return str(Path(__file__).absolute().parents[1])


@cache
def _with_components() -> frozenset[str]:
    """The top-level modules of packages that declare something for panda."""
    modules: set[str] = set()
    for distribution in metadata.distributions():
        text = distribution.read_text("entry_points.txt") or ""
        if "[panda." in text:
            values = [entry.value for entry in distribution.entry_points if entry.group.startswith("panda.")]
            modules |= {re.split("[.:]", value)[0].strip() for value in values}
    return frozenset(modules - {"panda"})
