"""The rehearsal: the longest micro batch of a run is trained on and forgotten before its first step.

A run that has no memory for it ends at its start, and not in the step in which it comes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from panda.data.batches import Batch
from panda.data.largest import LargestMicroBatch
from panda.data.largest import largest_to_come
from panda.data.loading import micro_batches_of
from panda.engine.memory import explaining_lack_of_memory
from panda.engine.memory_parts import gib
from panda.engine.rehearsing import rehearse
from panda.engine.rehearsing import what_forbids
from panda.files.activity import activity
from panda.files.activity import say
from panda.run.estimate import state_bytes
from panda.run.state import Run

DEVICES = ("cuda",)
"""Where runs rehearse. The memory of a CPU is not what ends a run."""
SAID_AFTER = 2.0
"""Seconds from which on it is said that there was a rehearsal."""


def rehearse_longest(run: Run, loss: Callable[..., Any], statistics: Callable[..., Any] | None) -> None:
    """Rehearse the largest micro batch of ``run``, on a GPU, if its next step has none as large.

    Every rank has to call it. All rehearse the same micro batch, and the one before it in its step, or after it:
    gradients are then held, as in the run.
    """
    begun = time.perf_counter()
    if run.processes.device.type not in DEVICES:
        return
    with activity("looking for the longest micro batch"):
        largest = run.processes.from_rank_0(lambda: largest_to_come(run.layout))
    if largest is None:
        return
    if why := what_forbids(run.engine):
        say(f"the longest micro batch ({largest}) is not rehearsed: {why}")
        return
    comes = f"({largest}), which comes in step {largest.step:,}"
    said = f"This was the rehearsal of the longest micro batch {comes}, before step {run.step + 1:,}."
    with activity(f"rehearsing the longest micro batch ({largest})"), explaining_lack_of_memory(lambda: said):
        made = _with_neighbour(run, largest)
        peak = rehearse(run.engine, made, loss, statistics, state_bytes=state_bytes(run.resolved, run.engine.module))
    seconds = time.perf_counter() - begun
    if seconds > SAID_AFTER:
        held = f"{gib(peak)} GiB, " if peak else ""
        say(f"rehearsed the longest micro batch ({largest}): {held}{seconds:.1f} s")


def _with_neighbour(run: Run, largest: LargestMicroBatch) -> list[Batch]:
    """The micro batch, and one next to it in its step if there is one, in their order."""
    of_step = micro_batches_of(
        run.layout,
        run.collate,
        largest.step,
        rank=largest.rank,
        **run.told_of_rows,
    )
    start = max(0, largest.number - 1)
    return [batch for batch in of_step[start : start + 2] if not batch.idle]
