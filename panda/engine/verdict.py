"""What the reports of all ranks mean: who keeps the others waiting, as one line. Knows neither threads nor stores."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from panda.engine.meeting import minutes
from panda.engine.meeting import spoken
from panda.engine.standing import Report

MOST_NAMED = 4
"""So many ranks are described each by itself."""


@dataclass(frozen=True)
class Seen:
    """The last report of a rank, as another one sees it."""

    report: Report
    silent: float
    """Seconds since it came."""
    state: Literal["", "gone", "stopped", "works"] = ""
    """What the system says of its process, where that is on the same machine."""


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a run that does not go on."""

    kind: Literal["gone", "late", "busy"]
    """Whether a rank is gone; some are expected in vain; or some work, for long."""
    about: tuple[int, ...]
    """The ranks that the others wait for."""
    line: str
    words: str = ""
    """Of ranks that are gone, in brief."""


def verdict(seen: Mapping[int, Seen], world_size: int, stall: float, busy: float) -> Verdict | None:
    """What keeps the run, whose ranks last reported ``seen``; None for nothing. Some may not have reported yet.

    A rank that neither moves nor works for ``stall`` seconds, while another waits as long, is late. One that works is
    only named after ``busy`` seconds: compiling, evaluating or writing may take that long.
    """
    here = {rank: each for rank, each in seen.items() if not each.report.done}
    if gone := {rank: each for rank, each in here.items() if each.state == "gone"}:
        words = "was killed" if len(gone) == 1 else "were killed"
        return Verdict("gone", tuple(gone), f"{spoken(gone)} {words}; last seen: {_places(gone)}", words)
    silent = {rank: each for rank, each in here.items() if each.silent >= stall and each.state != "works"}
    answering = {rank: each for rank, each in here.items() if rank not in silent}
    moving = {rank for rank, each in answering.items() if each.report.still < stall or each.state == "works"}
    waiting = {rank: each for rank, each in answering.items() if each.report.waits and rank not in moving}
    data = {rank: each for rank, each in answering.items() if each.report.data and each.report.idle >= stall}
    idle = {
        rank: each
        for rank, each in answering.items()
        if rank not in waiting and rank not in moving and each.report.idle >= stall
    }
    late = silent | data | (idle if waiting else {})
    if late:
        waiting = {
            rank: each for rank, each in answering.items() if each.report.waits and each.report.still > stall / 2
        }
        others = {rank: each for rank, each in waiting.items() if rank not in late}
        return Verdict("late", tuple(sorted(late)), _late(late, others, stall))
    in_vain = [rank for rank, each in waiting.items() if each.report.waits == "ranks" and each.report.idle >= stall]
    if len(in_vain) == len(seen) == world_size > 1:
        return Verdict("late", tuple(waiting), f"all ranks wait for each other: {_places(waiting)}")
    behind = {rank: each for rank, each in answering.items() if rank not in waiting}
    longest = max((each.report.still for each in waiting.values()), default=0.0)
    if behind and longest >= busy:
        whom = f"{spoken(waiting)} {_s(waiting, 'waits', 'wait')}"
        line = f"{whom} for {minutes(longest)}, since {spoken(behind)} {_s(behind, 'is', 'are')} at work"
        return Verdict("busy", tuple(behind), f"{line}: {_places(behind)}")
    return None


def _late(late: Mapping[int, Seen], waiting: Mapping[int, Seen], stall: float) -> str:
    alike: dict[str, dict[int, Seen]] = {}
    for rank, each in late.items():
        alike.setdefault(_why(each, stall), {})[rank] = each
    parts = []
    for why, some in alike.items():
        seconds = max(each.silent if each.silent >= stall else each.report.idle for each in some.values())
        have = _s(some, "has", "have")
        parts.append(f"{spoken(some)} {have} not arrived for {minutes(seconds)}, {why}: {_places(some)}")
    if waiting:
        parts.append(f"{spoken(waiting)} {_s(waiting, 'waits', 'wait')}: {_places(waiting)}")
    return "; ".join(parts)


def _why(each: Seen, stall: float) -> str:
    if each.state == "stopped":
        return "stopped by a signal"
    if each.silent >= stall:
        return "without an answer"
    return "without batches" if each.report.data else "without doing anything"


def _places(some: Mapping[int, Seen]) -> str:
    """Where ``some`` stand, those at the same place together."""
    alike: dict[str, list[int]] = {}
    for rank, each in some.items():
        place = each.report.place
        alike.setdefault(f"{place}: {each.report.data}" if each.report.data else place, []).append(rank)
    if len(alike) == 1:
        return next(iter(alike))
    named = [f"{spoken(ranks)} at {place}" for place, ranks in list(alike.items())[:MOST_NAMED]]
    return ", ".join(named) + (", ..." if len(alike) > MOST_NAMED else "")


def _s(ranks: Sequence[int] | Mapping[int, Seen], one: str, several: str) -> str:
    return one if len(ranks) == 1 else several
