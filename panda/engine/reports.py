"""What the ranks of a run say to each other in a store: where each stands, and which one has failed."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from dataclasses import dataclass
from typing import Any

from panda.engine.standing import Report


@dataclass(frozen=True)
class Failure:
    """Why a run fails; its ranks agree on the first."""

    by: int
    """The rank that says so."""
    words: str
    """In brief: ``rank 1 failed``."""
    text: str
    """What that rank prints."""


class Reports:
    """The reports of all ranks. One thread calls its methods; others read its attributes."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self.seen: dict[int, tuple[Report, float]] = {}
        """The last report of each rank that is read, and when it came."""
        self.reads_all = rank == 0
        self.claim: Failure | None = None
        """What this rank wants to be the failure."""
        self.have_spoken, self.has_spoken = 0, False
        """How many ranks have said that they end; whether this one has."""
        self._is_counted = False
        self.answered = time.monotonic()
        """When the last exchange with the store began that was answered."""

    def exchange(self, own: Report | None, *, is_done: bool) -> None:
        """Write the report of this rank, and read those of the others."""
        if own is not None:
            self._store.set(f"report/{self._rank}", json.dumps(asdict(own) | {"done": is_done}))
        others = range(self._world_size) if self.reads_all else range(min(1, self._rank))
        known = [rank for rank in others if rank != self._rank and (rank in self.seen or self._has(f"report/{rank}"))]
        if not known or is_done:
            return
        for rank, written in zip(known, self._store.multi_get([f"report/{rank}" for rank in known]), strict=True):
            report = Report(**json.loads(written))
            before = self.seen.get(rank)
            if before is None or (before[0].beat, before[0].done) != (report.beat, report.done):
                self.seen[rank] = (report, time.monotonic())

    def failure(self) -> Failure | None:
        """The failure on which the ranks agree: the first that one of them has claimed."""
        if self.claim is not None:
            self._store.compare_set("failure", "", json.dumps(asdict(self.claim)))
        if not self._has("failure"):
            return None
        return Failure(**json.loads(self._store.get("failure")))

    def count(self) -> None:
        """Count the ranks that have said that they end, this one too."""
        own, self._is_counted = int(self.has_spoken and not self._is_counted), self.has_spoken
        self.have_spoken = self._store.add("spoken", own)

    def tell_trouble(self, trouble: str | None) -> None:
        self._store.set("trouble", trouble or "")

    def trouble(self) -> str | None:
        return self._store.get("trouble").decode() or None if self._has("trouble") else None

    def _has(self, key: str) -> bool:
        return bool(self._store.check([key]))
