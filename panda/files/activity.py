"""What this process is doing: in a few words, and, where somebody watches, with how far it is.

In a terminal each activity under way is a line below what has been printed; elsewhere one that takes long is a line
every ten seconds. Only the first rank speaks.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
    from rich.live import Live

LINE_SECONDS = 10.0
"""Between two lines about an activity where there is no terminal."""
TICK_SECONDS = 1.0
"""Between two looks whether such a line is due."""
REFRESHED = 4
"""Times a second that a terminal is written."""
SHOWN_AFTER = 0.3
"""Seconds after which an activity is shown in a terminal unless announced: a shorter one would only flicker."""
BAR = 20
"""Characters of a bar."""

_words = "starting"
_said = 0


def stand(words: str) -> None:
    """Note what this process is doing, in a few words, for whoever asks (``standing``). Shows nothing."""
    global _words, _said
    _words = words
    _said += 1


def standing() -> tuple[str, int]:
    """What this process does, and how often that has changed."""
    return _words, _said


@dataclass
class Activity:
    """Something that takes a while."""

    what: str
    total: float | None = None
    """How much there is to do; None where that is not known."""
    done: float = 0
    unit: str = ""
    """Of these, such as ``rows``; ``B`` for bytes."""
    facts: list[str] = field(default_factory=list)
    """What else to say, the most important first."""
    begun: float = field(default_factory=lambda: time.monotonic())
    done_before: float = 0
    """Of ``done``, what does not count for the speed: steps of an earlier start."""
    announced: bool = False
    """Whether it is shown from its beginning."""
    own_lines: bool = False
    """Whether the caller prints the lines where there is no terminal."""

    def advance(self, count: float = 1) -> None:
        """Note that so much more is done."""
        self.done += count

    @property
    def seconds(self) -> float:
        """For which it has gone on."""
        return time.monotonic() - self.begun

    @property
    def left(self) -> float | None:
        """Seconds that it will take at the pace until now; None where that is not known."""
        done = self.done - self.done_before
        if self.total is None or done <= 0:
            return None
        return max(0.0, self.total - self.done) * self.seconds / done

    def text(self, width: int, *, bar: bool) -> str:
        """One line of at most ``width`` characters. What comes last is left out first."""
        counted = _counted(self.done, self.total, self.unit)
        left = f"ETA {duration(self.left)}" if self.left is not None else duration(self.seconds)
        parts = [self.what, counted, left, *self.facts]
        if bar and self.total:
            parts.insert(1, _bar(self.done / self.total))
        return as_fits(parts, width)


def as_fits(parts: Iterable[str], width: int) -> str:
    """``parts`` on one line of at most ``width`` characters. What comes last is left out first."""
    line = ""
    for part in filter(None, parts):
        longer = f"{line}  {part}" if line else part
        if len(longer) > width:
            break
        line = longer
    return line[:width]


_under_way: list[Activity] = []
_live: Live | None = None
_ticking: threading.Timer | None = None
_spoken = 0.0


@contextmanager
def activity(
    what: str,
    total: float | None = None,
    *,
    unit: str = "",
    done: float = 0,
    announced: bool = False,
    own_lines: bool = False,
    any_rank: bool = False,
) -> Iterator[Activity]:
    """Show ``what`` while the body runs, which says by ``advance`` how far it is.

    ``announced``: it is shown, or said, at its beginning: what follows may keep this process from showing anything.
    With ``own_lines`` the caller prints the lines where there is no terminal.
    ``any_rank``: also shown by another rank than the first, for what only one of them does.
    """
    before = _words
    stand(what)
    shown = Activity(what, total, done, unit, done_before=done, announced=announced, own_lines=own_lines)
    speaks = _speaks(any_rank=any_rank)
    if speaks:
        if announced and not is_terminal():
            print(f"{what} ...", flush=True)
        _under_way.append(shown)
        _begin(quiet=own_lines)
    try:
        yield shown
    finally:
        if speaks:
            _under_way.remove(shown)
            _end()
        stand(before)


def say(line: str) -> None:
    """Print ``line`` above what is under way, if this process speaks."""
    global _spoken
    if _speaks():
        _spoken = time.monotonic()
        print(line, flush=True)


def is_terminal() -> bool:
    """Whether somebody watches as it happens."""
    return bool(sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb")


def duration(seconds: float) -> str:
    """As ``0:42``, ``12:05`` or ``3:04:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _speaks(*, any_rank: bool = False) -> bool:
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and (any_rank or os.environ.get("RANK", "0") == "0")


def _begin(*, quiet: bool) -> None:
    global _live, _ticking
    if is_terminal():
        if _live is None:
            from rich.console import Console
            from rich.live import Live

            _live = Live(console=Console(), get_renderable=_lines, refresh_per_second=REFRESHED, transient=True)
            _live.start(refresh=True)
    elif _ticking is None and not quiet:
        _tick()


def _end() -> None:
    global _live, _ticking
    if _under_way:
        return
    if _live is not None:
        _live.stop()
        _live = None
    if _ticking is not None:
        _ticking.cancel()
        _ticking = None


def _lines() -> Any:
    from rich.console import Group
    from rich.text import Text

    width = _live.console.width - 1 if _live is not None else 79
    shown = [each for each in [*_under_way] if each.announced or each.seconds >= SHOWN_AFTER]
    return Group(*(Text(each.text(width, bar=True), no_wrap=True, overflow="crop") for each in shown))


def _tick() -> None:
    """Once a second: say what is done if nothing has been said for long."""
    global _ticking, _spoken
    _ticking = threading.Timer(TICK_SECONDS, _tick)
    _ticking.daemon = True
    _ticking.start()
    current = _under_way[-1] if _under_way and not _under_way[-1].own_lines else None
    if current is not None and min(time.monotonic() - _spoken, current.seconds) >= LINE_SECONDS:
        _spoken = time.monotonic()
        print(f"{time.strftime('%H:%M:%S')}  {current.text(200, bar=False)}", flush=True)


def _bar(share: float) -> str:
    full = round(BAR * min(1.0, max(0.0, share)))
    return "━" * full + "─" * (BAR - full)


def _counted(done: float, total: float | None, unit: str) -> str:
    scale, digits, name = 1.0, 0, unit
    if unit == "B":
        scale, digits, name = (1e9, 1, "GB") if max(done, total or 0) >= 1e9 else (1e6, 0, "MB")
    numbers = ([done] if done else []) if total is None else [done, total]
    counted = "/".join(f"{number / scale:,.{digits}f}" for number in numbers)
    return f"{counted} {name}".rstrip() if counted else ""
