"""What the displays of a run cost a step: all of panda's, in a terminal, against none.

    python bench/displays.py --steps 600

Trains llama-tiny on the sample data, on the CPU. In blocks of ten steps in turn, the displays (progress in a terminal
of its own, metrics.jsonl, TensorBoard and loss.png, with a record every step) are on and off, so that what else the
machine does meets both alike; the first step of a block is not counted. Prints the milliseconds of a step by wall clock
and by CPU time of all threads, as medians and as means without the highest tenth, and exits with 1 where the medians of
the wall clock are apart by more than `--most` percent. The picture is drawn after the last step, and named by itself.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import panda
from panda.files import activity
from panda.hooks.metrics import Metrics
from panda.hooks.plot import Plot
from panda.hooks.progress import ProgressDisplay
from panda.hooks.tensorboard import TensorBoard
from panda.registry import NoOptions
from panda.registry import hookimpl
from panda.registry import register_plugin

BLOCK = 10
WARM = 20
"""Steps at the beginning that are not counted."""
TENTH = 0.1


class Displays:
    """Whether the displays are on."""

    on = True


def switchable(hook: Callable[..., None]) -> Callable[..., None]:
    """``hook``, called only where the displays are on."""

    @functools.wraps(hook)  # with pluggy's mark, and its parameters
    def called(*arguments: Any, **named: Any) -> None:
        if Displays.on:
            hook(*arguments, **named)

    return called


for display in (ProgressDisplay, Metrics, TensorBoard, Plot):
    for name in ("panda_step_end", "panda_log"):
        if name in vars(display):
            setattr(display, name, switchable(vars(display)[name]))


@register_plugin("stopwatch")
class Stopwatch:
    """Notes what each step took, and switches the displays after each block."""

    acts = False
    steps: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    """Wall and CPU seconds of each step without displays, and of each with them."""
    begun = (0.0, 0.0)
    ended = 0.0

    def __init__(self, options: NoOptions, context: Any) -> None: ...

    @hookimpl(trylast=True)
    def panda_step_end(self, run: Any, step: int) -> None:
        now = (time.perf_counter(), time.process_time())
        if step > WARM and (step - 1) % BLOCK:
            self.steps[Displays.on].append((now[0] - Stopwatch.begun[0], now[1] - Stopwatch.begun[1]))
        if step % BLOCK == 0:
            Displays.on = not Displays.on
            live = activity._live
            if live is not None:
                (live.start if Displays.on else live.stop)()
        if step == run.plan.total_steps:
            Displays.on = True
            Stopwatch.ended = now[0]
        Stopwatch.begun = (time.perf_counter(), time.process_time())


def terminal_in_place_of_stdout() -> Any:
    """Make stdout a terminal of its own, which is read and forgotten, and return what stdout was."""
    before = os.fdopen(os.dup(1), "w", buffering=1)
    master, slave = os.openpty()
    os.dup2(slave, 1)
    os.environ |= {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}

    def drain() -> None:
        while os.read(master, 65536):
            pass

    threading.Thread(target=drain, daemon=True).start()
    return before


def trimmed(values: Sequence[float]) -> float:
    """The mean without the highest tenth."""
    return statistics.fmean(sorted(values)[: max(1, round(len(values) * (1 - TENTH)))])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--most", type=float, default=2.0, help="percent that the displays may cost")
    arguments = parser.parse_args(argv)
    if arguments.steps < WARM + 2 * BLOCK:
        parser.error(f"--steps: expected at least {WARM + 2 * BLOCK}")
    out = terminal_in_place_of_stdout()
    with tempfile.TemporaryDirectory() as scratch:
        panda.train(
            "panda:configs/instruct-tiny.yaml",
            max_steps=arguments.steps,
            logging_steps=1,
            save_final=False,
            save_minutes=0,
            output_dir=Path(scratch) / "run",
            plugins=["stopwatch"],
        )
        end = time.perf_counter() - Stopwatch.ended
    print("| clock | of a step | displays off, ms | on, ms | |\n|---|---|---|---|---|", file=out)
    costs = {}
    for place, clock in enumerate(("wall", "CPU")):
        for what, measure in (("median", statistics.median), ("mean of nine tenths", trimmed)):
            off, on = (1000 * measure([step[place] for step in steps]) for steps in Stopwatch.steps)
            costs[clock, what] = 100 * (on / off - 1)
            print(f"| {clock} | {what} | {off:.2f} | {on:.2f} | {costs[clock, what]:+.2f} % |", file=out)
    counted = " and ".join(str(len(steps)) for steps in Stopwatch.steps)
    print(f"\n{counted} steps; the end of the run, with its picture and export, took {end:.1f} s", file=out)
    return int(costs["wall", "median"] > arguments.most)


if __name__ == "__main__":
    sys.exit(main())
