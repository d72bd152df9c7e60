"""Python's garbage collector, kept out of optimizer steps.

It looks for objects that only refer to each other, when enough objects were made: at any moment, and every now and then
among all of them, which are half a million once libraries and an engine are loaded. Meanwhile the device runs out of
work, and with several ranks all wait for the slowest. So the objects of the start are set apart, and the collector
is called where it costs least.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

MOST_NEW = 100_000
"""Objects that may be made since the last collection before one begins by itself, wherever the run is: without it the
memory of a task that makes cycles could grow in a long step or evaluation. By default Python has 700 to 2,000."""
WHOLE_AFTER = 1_000
"""Steps after which older objects are looked at, too."""


@contextmanager
def collected_between_steps() -> Iterator[None]:
    """Inside it, objects are collected by ``collect`` only, if fewer than ``MOST_NEW`` are made in between."""
    thresholds = gc.get_threshold()
    sets_apart = not gc.get_freeze_count()  # otherwise the caller has done so, and what it froze would be lost
    gc.collect()
    if sets_apart:
        # No collection looks at these objects from here on. Workers that are forked go on sharing their memory.
        gc.freeze()
    gc.set_threshold(MOST_NEW, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if sets_apart:
            gc.unfreeze()


def collect(step: int | None = None) -> None:
    """Free what was made since the last call and is garbage by now: after ``step``, or where more time may pass, all.

    After a step this takes some twenty microseconds (a CPU, Python 3.11, 2026-11-26).
    """
    gc.collect(2 if step is None or step % WHOLE_AFTER == 0 else 1)
