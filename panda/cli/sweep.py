"""``panda sweep``: trains a grid of values, one run after another; started again, it does what is left."""

from __future__ import annotations

import contextlib
import io
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from panda.cli.command import run_command
from panda.cli.grid import Point
from panda.cli.grid import Sweep
from panda.cli.grid import read_command
from panda.cli.run_folders import is_run
from panda.cli.run_folders import runs_below
from panda.cli.runs import described
from panda.cli.runs import print_table
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import Configuration
from panda.configuration.configure import configure
from panda.files.activity import duration
from panda.files.locks import HeldError
from panda.files.locks import held
from panda.files.parent import end_with_parent
from panda.files.terminal import number_of
from panda.files.terminal import printable
from panda.files.whole import check_can_be_made
from panda.registry import UserError
from panda.run.description import changes
from panda.run.description import read_end
from panda.run.directory import configuration_in
from panda.run.interruption import PASSED_ON
from panda.run.interruption import SAVED

USAGE = """\
usage: panda sweep CONFIG --KEY VALUE,VALUE ... [--output_dir DIR] [--print]
                   [--launch COMMAND]

Train each combination of the values that flags of panda-train are given, one
run after another, each in a folder of DIR that is named by what differs, such
as DIR/learning_rate=1e-4,seed=0. Started again, it passes over runs that have
finished, goes on with those that have not, and begins the rest. A run that
fails does not end the others. At the end there are a table of the runs and a
picture of their curves, DIR/sweep.png.

  --KEY A,B          a comma separates values: one run for each
  --KEY [A,B],[C]    brackets hold a list together: two values, of two items
                     and of one
  --KEY A B          several words are one value, a list, as for panda-train
  \\,                 a comma within a value

  --output_dir DIR   the folder of the runs; by default runs/sweep-NAME, for a
                     file NAME.yaml
  --print            print a command for each run that has not finished, and
                     train nothing (also --dry_run)
  --launch COMMAND   what starts each run, by default panda-train itself

A mistake in any of the combinations is reported before the first run begins.
Exit codes: 0 where all runs have finished, 1 where one has not, 75 where the
sweep was interrupted; the run under way has then saved.

examples:
  panda sweep panda:configs/instruct-tiny.yaml --learning_rate 1e-4,3e-4
  panda sweep panda:configs/lora.yaml --lora_r 8,16 --seed 0,1 \\
      --launch "torchrun --nproc_per_node 8 --no-python\""""

MORE_STEPS = {"max_steps", "num_train_epochs"}
"""Keys that have a run which has finished go on."""
FAILED = 1
LOCK = ".sweep.lock"
"""The file in the folder of a sweep that is locked while it trains."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda sweep``."""
    codes: list[int] = []
    return run_command(lambda argv: codes.append(_sweep(argv)), argv) or next(iter(codes), 0)


def _sweep(argv: list[str]) -> int:
    if {"-h", "--help"} & {*argv}:
        print(USAGE)
        return 0
    sweep = read_command(argv, USAGE)
    done = check_points(sweep.points)
    left = [point for point in sweep.points if point not in done]
    if sweep.only_prints:
        for point in left:
            print(shlex.join([*sweep.launch, "panda-train", *point.argv]))
        return 0
    check_can_be_made(sweep.folder, "output_dir")
    sweep.folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(sweep.folder):
        finished = f", of which {number_of(len(done), 'has', 'have')} finished" if done else ""
        print(f"{number_of(len(sweep.points), 'run')} in {sweep.folder}/{finished}")
        failed = _train(sweep, left)
        report(sweep, failed)
    return FAILED if failed else 0


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let no other sweep train in ``folder`` meanwhile. Raises UserError where one does."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(folder / LOCK, unlocked="make sure that only one sweep at a time uses it."))
        except HeldError as problem:
            raise UserError(
                f"{folder}: another sweep is training in it: {problem.holder}. Wait for it to end, or stop it; for a"
                " separate sweep, name another folder with `--output_dir`."
            ) from None
        except OSError as problem:
            raise UserError(f"{folder}: cannot be written to: {problem.strerror}.") from None
        yield


# -- before the first run ---------------------------------------------------------------------


def check_points(points: Sequence[Point]) -> list[Point]:
    """Those of ``points`` that have finished. Raises UserError with all that is wrong with any of them."""
    problems: dict[str, list[str]] = {}
    done = []
    for point in points:
        try:
            # What is only said is said by the run itself.
            with contextlib.redirect_stderr(io.StringIO()):
                if _has_finished(point):
                    done.append(point)
        except UserError as problem:
            for line in str(problem).split("\n"):
                problems.setdefault(line, []).append(point.title or point.name)
    if problems:
        raise UserError("\n".join(_said(line, names, len(points)) for line, names in problems.items()))
    return done


def _said(line: str, names: list[str], total: int) -> str:
    if len(names) == total or line.startswith(" "):
        return line
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}: {line}"


def _has_finished(point: Point) -> bool:
    """Whether nothing is left to do for ``point``. Raises UserError where it cannot be trained."""
    arguments = parse_arguments(point.argv)
    configuration = configure(arguments)

    from panda.run.first_look import look_first
    from panda.run.first_look import planned_world_size

    end = read_end(point.directory)
    if end is None:
        look_first(configuration, planned_world_size(configuration))
        return False
    given = {key.rpartition(".")[2] for key, value in arguments.given.items() if value.value != "auto"}
    found = changes(configuration.resolved, configuration_in(point.directory)).items()
    differing = {
        key: values
        for key, values in found
        if key.rpartition(".")[2] in given and not _is_fixed(values["before"], values["now"])
    }
    if not differing:
        return True
    if {*differing} <= MORE_STEPS:
        _refuse_fewer_steps(point, configuration, differing, end)
        return False
    key, values = next((key, values) for key, values in differing.items() if key not in MORE_STEPS)
    raise UserError(
        f"{point.directory} has finished with {key} {values['before']}, and it is {values['now']} now. Name another"
        " folder with `--output_dir`, or move this one away."
    )


def _refuse_fewer_steps(
    point: Point, configuration: Configuration, differing: Mapping[str, Any], end: Mapping[str, Any]
) -> None:
    """Raise UserError where ``point`` has done more than it is asked for now."""
    fewer = [key for key, values in differing.items() if _is_less(values["now"], values["before"])]
    if not fewer and not 0 < configuration.options.max_steps < end["step"]:
        return
    asked = ", ".join(f"{key} {values['now']}" for key, values in differing.items())
    raise UserError(
        f"{point.directory} has done {number_of(end['step'], 'step')}, and is asked for fewer now ({asked}). Name"
        " another folder with `--output_dir`, or move this one away."
    )


def _is_less(now: Any, before: Any) -> bool:
    """Whether ``now`` is a lower limit than ``before``; -1 is none."""
    now, before = (math.inf if value in (None, -1) else value for value in (now, before))
    return bool(now < before)


def _is_fixed(before: Any, now: Any) -> bool:
    """Whether a run recorded ``before`` for ``now``, with the commits of data sets on the hub."""
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_is_fixed, before, now))
    return before == now or (isinstance(before, str) and before.startswith(f"{now}@"))


# -- the runs ---------------------------------------------------------------------------------


def _train(sweep: Sweep, left: Sequence[Point]) -> list[Point]:
    """Train the runs of ``left``; those that failed. Raises SystemExit where the sweep is interrupted."""
    failed = []
    for number, point in enumerate(left, 1):
        line = f"run {number} of {len(left)}: {point.name}"
        rule = "─" * max(0, min(100, shutil.get_terminal_size().columns - 1) - len(line) - 4)
        print(printable(f"\n── {line} {rule}".rstrip()), flush=True)
        code, is_interrupted = _run([*sweep.launch, *_program(sweep.launch), *point.argv])
        if is_interrupted:
            print(f"the sweep was interrupted in {point.name}; the same command goes on with it", flush=True)
            raise SystemExit(SAVED)
        if code != 0:
            failed.append(point)
            what = "has saved before its end" if code == SAVED else f"has failed (exit code {code})"
            print(printable(f"{point.name} {what}; the sweep goes on"), flush=True)
    return failed


def _program(launch: list[str]) -> list[str]:
    """What starts panda-train: the one of this panda, whichever comes first in PATH."""
    beside = Path(sys.executable).with_name("panda-train")
    if launch:
        return [str(beside) if beside.is_file() else "panda-train"]
    return [sys.executable, "-P", "-m", "panda.cli.train"]


def _run(command: list[str]) -> tuple[int, bool]:
    """Run ``command``: its exit code, and whether a signal has asked the sweep to end, which is passed on to it.

    It is in a session of its own: else Ctrl-C in a terminal would reach it twice, and end it without saving.
    """
    heard: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: object) -> None:
        heard.append(number)
        if process is not None:
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, pass_on) for number in numbers]
    try:
        # A scheduler signals all processes of a job, and this passes its signal on: the run hears it twice.
        environment = os.environ | {PASSED_ON: "1"}
        process = subprocess.Popen(command, start_new_session=True, env=environment, preexec_fn=_ends_with_parent())
        if heard:  # before it began
            process.send_signal(signal.SIGTERM)
        return process.wait(), bool(heard)
    except OSError as problem:
        raise UserError(f"--launch: {command[0]!r} cannot be started: {problem.strerror}.") from None
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _ends_with_parent() -> Callable[[], None]:
    """What a child calls to be sent SIGTERM where this process ends without a word, as by SIGKILL.

    It saves then, and does not train on where nobody waits for it.
    """
    return partial(end_with_parent, os.getpid(), signal.SIGTERM)


# -- at the end -------------------------------------------------------------------------------


def report(sweep: Sweep, failed: Sequence[Point]) -> None:
    """Print the table of the runs and the best of them, and draw their curves."""
    print()
    rows: dict[str, dict[str, Any]] = {}
    for point in sweep.points:
        if is_run(point.directory):
            rows[point.name] = described(point.directory, sweep.folder)
            if point in failed and rows[point.name]["status"] != "interrupted":
                rows[point.name]["status"] = "failed"
    if rows:
        print_table(list(rows.values()), sweep.folder)
    for point in failed:
        if point.name not in rows:
            print(f"{point.name}: failed before it began")
    measure, metric, higher = _measure([*rows.values()])
    known = [row for row in rows.values() if row[measure] is not None]
    if len(known) > 1:
        best = (max if higher else min)(known, key=lambda row: row[measure])
        what = {"loss": "training loss", "eval_loss": "evaluation loss"}.get(metric, metric)
        print(f"\n{'highest' if higher else 'least'} {what}: {best[measure]:.4f}, {best['run']}")
    found = [point for point in sweep.points if point.name in rows]
    _draw(sweep, [point for point in found if rows[point.name][measure] is not None], metric)
    steps = duration(sum(_seconds(point.directory) for point in found))
    print(f"{steps} of steps in {number_of(len(found), 'run')}, without starts, evaluations and saves")
    _name_others(sweep)


def _name_others(sweep: Sweep) -> None:
    """Name the runs in the folder of ``sweep`` that are not of its grid, such as those of an earlier one."""
    own = {point.directory for point in sweep.points}
    others = [run.name for run in runs_below(sweep.folder) if run not in own]
    if others:
        named = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        print(printable(f"not of this grid, in the same folder: {number_of(len(others), 'run')} ({named})"))


def _measure(rows: Sequence[dict[str, Any]]) -> tuple[str, str, bool]:
    """The key of ``rows`` that says how good a run is, the entry of records that it is of, and whether it is the better
    the higher it is. Where the runs name several metrics, or none, it is the loss."""
    named = {(row["best_metric"], row["higher_is_better"]) for row in rows if row["best_metric"] is not None}
    if len(named) == 1:
        metric, higher = named.pop()
        return "best_value", metric, higher
    evaluated = any(row["best_eval_loss"] is not None for row in rows)
    return ("best_eval_loss", "eval_loss", False) if evaluated else ("least_loss", "loss", False)


def _seconds(run: Path) -> float:
    from panda.hooks.metrics import read_metrics

    steps, last = 0.0, 0
    for record in read_metrics(run):
        if math.isfinite(record["step_seconds"]):
            steps += record["step_seconds"] * (record["step"] - last)
        last = record["step"]
    return steps


def _draw(sweep: Sweep, points: Sequence[Point], metric: str) -> None:
    from panda.hooks.curves import Recorded
    from panda.hooks.curves import draw_runs

    if not points:
        return
    picture = sweep.folder / "sweep.png"
    draw_runs([Recorded.read(point.directory, point.name) for point in points], picture, metric=metric, over="steps")
    print(picture)
