"""Where a process stands: what it last said of itself, its main thread's innermost frame, and whether it goes on.

Read by a thread (watchdog.py). The main thread only sets a variable (files/activity.py).
"""

from __future__ import annotations

import os
import re
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from typing import Literal
from typing import NamedTuple

from panda.files.activity import standing

BUSY_SHARE = 0.02
"""A process that uses less of one core than this, its threads and children included, and reads and writes less than
BUSY_BYTES a second, does nothing."""
BUSY_BYTES = 2**18
PACKAGE = str(Path(__file__).parents[1]) + os.sep

Waits = Literal["", "ranks", "lock"]
_WAITS_IN: dict[str, Waits] = {
    os.path.join("torch", "distributed", ""): "ranks",
    os.path.join("deepspeed", "comm", ""): "ranks",
    os.path.join("panda", "engine", "meeting.py"): "ranks",
    os.path.join("panda", "files", "locks.py"): "lock",
}
"""Parts of the files of functions in which a rank waits for others, or for another process."""
_BATCHES = os.path.join("torch", "utils", "data", "")
_STDLIB = sysconfig.get_path("stdlib")
_LIBRARIES = re.compile(r"-packages/(torch|deepspeed|fairscale|pluggy|transformers|accelerate|peft|numpy)/|^<")
"""Files of functions that say less of where a process stands than their callers."""


@dataclass(frozen=True)
class Report:
    """Where a rank stands, as it tells the others."""

    rank: int
    words: str
    frame: str
    """The innermost frames of its main thread, as text."""
    still: float
    """Seconds for which neither its words nor its frames have changed."""
    idle: float
    """Seconds for which, besides, it has used no processor and no disk."""
    waits: Waits
    """What its main thread waits for: other ranks, or the lock of another process."""
    data: str
    """Where the processes stand that prepare its batches, if it has waited for them for long; else empty."""
    host: str
    """Where its process id counts."""
    pid: int
    beat: int
    """Counts its reports."""
    done: bool = False
    """Whether it has ended as it should."""

    @property
    def place(self) -> str:
        """Its words and its frames."""
        return f"{self.words}, {self.frame}" if self.frame else self.words


def this_host() -> str:
    """The machine, and the part of it in which process ids are the same."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def is_gone(pid: int) -> bool:
    """Whether the process ``pid`` of this machine has ended, reaped by its parent or not."""
    try:
        return _state(pid) in "ZX"
    except OSError:
        return True


def is_stopped(pid: int) -> bool:
    """Whether the process ``pid`` of this machine was stopped by a signal."""
    with suppress(OSError):
        return _state(pid) in "Tt"
    return False


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class Look(NamedTuple):
    """What a process sees of itself. The fields are those of ``Report``."""

    words: str
    frame: str
    still: float
    idle: float
    waits: Waits
    for_data: bool
    """Whether the main thread waits for a batch."""


class Standing:
    """Watches where this process stands. One thread calls ``look`` every few seconds."""

    def __init__(self) -> None:
        now = time.monotonic()
        self._still_since = self._idle_since = self._looked = now
        self._signature: Any = None
        self._used = self._moved = 0.0
        self._main = threading.main_thread().ident

    def look(self) -> Look:
        """Where the main thread is now."""
        now = time.monotonic()
        frames = list(_outwards(sys._current_frames().get(self._main or 0)))
        words, changed = standing()
        signature = (changed, tuple((id(frame.f_code), frame.f_lasti) for frame in frames))
        if signature != self._signature:
            self._signature, self._still_since = signature, now
        used, moved = _used(with_children=self._still_since < now), _moved()
        seconds = max(now - self._looked, 1e-3)
        is_busy = used - self._used > BUSY_SHARE * seconds or moved - self._moved > BUSY_BYTES * seconds
        if is_busy or self._still_since == now:
            self._idle_since = now
        self._used, self._moved, self._looked = used, moved, now
        files = [frame.f_code.co_filename for frame in frames]
        waits: Waits = next((what for part, what in _WAITS_IN.items() if any(part in file for file in files)), "")
        for_data = any(_BATCHES in file for file in files)
        return Look(words, described(frames), now - self._still_since, now - self._idle_since, waits, for_data)


def described(frames: list[FrameType]) -> str:
    """The innermost of ``frames`` that is not of a library, and the function that it calls, as text."""
    own = next((place for place, frame in enumerate(frames) if not _is_of_library(frame)), 0)
    if not frames:
        return ""
    code = frames[own].f_code
    file = code.co_filename.removeprefix(PACKAGE)
    file = os.path.join("panda", file) if file != code.co_filename else file
    calls = f", in {frames[0].f_code.co_name}" if own else ""
    return f"{file}:{frames[own].f_lineno} ({code.co_name}{calls})"


def _is_of_library(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    is_of_python = file.startswith(_STDLIB) and "-packages" not in file
    return not file.startswith(PACKAGE) and (is_of_python or _LIBRARIES.search(file) is not None)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _used(*, with_children: bool) -> float:
    """Seconds of processor that this process has used, and its children."""
    return time.process_time() + (sum(used_by(pid) for pid in _children(os.getpid())) if with_children else 0.0)


def _children(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                yield int(child)
                yield from _children(int(child))


def used_by(pid: int) -> float:
    """Seconds of processor that the process ``pid`` has used; 0 if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _moved() -> float:
    """Bytes that this process has read and written."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0.0
    return float(sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar", "read_bytes"))))
