"""``panda sweep``: trains a grid of values, one run after another; started again, it does what is left."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panda.cli.command import run_command
from panda.cli.parser import in_short
from panda.cli.run_folders import is_run
from panda.cli.runs import described
from panda.cli.runs import print_table
from panda.configuration.arguments import parse_arguments
from panda.configuration.arguments import words_of_flags
from panda.configuration.configure import configure
from panda.files.activity import duration
from panda.files.terminal import number_of
from panda.files.terminal import printable
from panda.files.whole import check_can_be_made
from panda.registry import UserError
from panda.registry.location import resolve_path
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

OWN = ("output_dir", "run_name", "resume", "launch", "print", "dry_run", "config", "conf_path")
"""Flags that are not varied."""
LONGEST = 40
"""Characters of a value in the name of a folder."""
MORE_STEPS = {"max_steps", "num_train_epochs"}
"""Keys that have a run which has finished go on."""
FAILED = 1


@dataclass(frozen=True)
class Point:
    """A combination of values, which is a run."""

    name: str
    """By what differs."""
    directory: Path
    argv: list[str]
    """Of panda-train."""


@dataclass(frozen=True)
class Sweep:
    """What a command line asks for."""

    folder: Path
    points: list[Point]
    launch: list[str]
    only_prints: bool


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda sweep``."""
    codes: list[int] = []
    return run_command(lambda argv: codes.append(_sweep(argv)), argv) or next(iter(codes), 0)


def _sweep(argv: list[str]) -> int:
    if {"-h", "--help"} & {*argv}:
        print(USAGE)
        return 0
    sweep = read_command(argv)
    done = check_points(sweep.points)
    left = [point for point in sweep.points if point not in done]
    if sweep.only_prints:
        for point in left:
            print(shlex.join([*sweep.launch, "panda-train", *point.argv]))
        return 0
    check_can_be_made(sweep.folder, "output_dir")
    print(
        f"{number_of(len(sweep.points), 'run')} in {sweep.folder}/"
        + (f", of which {len(done)} have finished" if done else "")
    )
    failed = _train(sweep, left)
    report(sweep, failed)
    return FAILED if failed else 0


# -- what is asked for ------------------------------------------------------------------------


def read_command(argv: Sequence[str]) -> Sweep:
    """What the words ``argv`` ask for. Raises UserError."""
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    own: dict[str, str] = {}
    shared: list[str] = []
    varied: dict[str, list[tuple[str, list[str]]]] = {}
    for flag, words in words_of_flags(list(argv)):
        key = flag.lstrip("-").replace("-", "_")
        if key in OWN:
            if key in ("run_name", "resume"):
                raise UserError(f"{flag}: a sweep names its runs and resumes them itself. Leave it out.")
            own["config" if key == "conf_path" else key] = " ".join(words)
        elif len(values := [words] if len(words) != 1 or not flag.startswith("--") else split_values(words[0])) == 1:
            shared += [flag, *values[0]]
        else:
            varied[flag] = [(name_of(value), value) for value in values]
            _check_different(flag, [value for _, value in varied[flag]])
    if not own.get("config"):
        raise UserError(f"no configuration is given: panda sweep CONFIG --KEY VALUE,VALUE.\n{in_short(USAGE)}")
    if not varied:
        raise UserError("nothing varies: give a flag several values, as in `--learning_rate 1e-4,3e-4`.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "a sweep is not started by a launcher, but starts one for each run: panda sweep ... --launch"
            ' "torchrun --nproc_per_node N --no-python".'
        )
    stem = Path(own["config"].partition(":")[2] or own["config"]).stem
    folder = resolve_path(own["output_dir"]) if own.get("output_dir") else Path("runs") / f"sweep-{stem}"
    points = list(_points(folder, ["--config", own["config"], *shared], varied))
    for name, count in Counter(point.name for point in points).items():
        if count > 1:
            raise UserError(f"two of the runs would be in one folder, {name}. Write their values so that they differ.")
    return Sweep(folder, points, shlex.split(own.get("launch", "")), bool({"print", "dry_run"} & {*own}))


def split_values(text: str) -> list[list[str]]:
    """The values in ``text``, each as the words that a flag would be given. Raises UserError."""
    values: list[list[str]] = []
    for part in _between_commas(text):
        bracketed = re.fullmatch(r"\[([^\[\]]*)\]", part)
        words = _between_commas(bracketed[1]) if bracketed else [part]
        if "" in words and (bracketed or len(text) > 0):
            raise UserError(
                f"{text!r}: a value between commas is missing. Write A,B, and `\\,` for a comma in a value."
            )
        values.append([word.replace("\\,", ",") for word in words])
    return values


def _between_commas(text: str) -> list[str]:
    """The parts of ``text`` between commas, but not those within brackets or after a backslash."""
    parts, depth, begun = [], 0, 0
    for place, character in enumerate(text):
        depth = max(0, depth + {"[": 1, "]": -1}.get(character, 0))
        if character == "," and depth == 0 and text[place - 1 : place] != "\\":
            parts.append(text[begun:place].strip())
            begun = place + 1
    return [*parts, text[begun:].strip()]


def name_of(words: Sequence[str]) -> str:
    """A value in the name of a folder. A long one is cut, and told from others by a hash."""
    text = "+".join(words)
    plain = re.sub(r"[^\w.+-]+", "-", text).strip("-")
    if plain == text and len(plain) <= LONGEST:
        return plain
    return f"{plain[:LONGEST]}-{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:6]}"


def _check_different(flag: str, values: list[list[str]]) -> None:
    for number, value in enumerate(values):
        if value in values[:number]:
            raise UserError(f"{flag}: {' '.join(value)!r} is given twice.")


def _points(folder: Path, shared: list[str], varied: dict[str, list[tuple[str, list[str]]]]) -> Iterator[Point]:
    for values in itertools.product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        name = ",".join(f"{flag.lstrip('-').replace('-', '_')}={short}" for flag, (short, _) in chosen.items())
        flags = [word for flag, (_, words) in chosen.items() for word in (flag, *words)]
        directory = folder / name
        yield Point(name, directory, [*shared, *flags, "--output_dir", str(directory), "--resume", "auto"])


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
                problems.setdefault(line, []).append(point.name)
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

    if read_end(point.directory) is None:
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
        return False
    key, values = next((key, values) for key, values in differing.items() if key not in MORE_STEPS)
    raise UserError(
        f"{point.directory} has finished with {key} {values['before']}, and it is {values['now']} now. Name another"
        " folder with `--output_dir`, or move this one away."
    )


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
        process = subprocess.Popen(command, start_new_session=True, env=os.environ | {PASSED_ON: "1"})
        if heard:  # before it began
            process.send_signal(signal.SIGTERM)
        return process.wait(), bool(heard)
    except OSError as problem:
        raise UserError(f"--launch: {command[0]!r} cannot be started: {problem.strerror}.") from None
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


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
        print_table(list(rows.values()))
    for point in failed:
        if point.name not in rows:
            print(f"{point.name}: failed before it began")
    measure = "best_eval_loss" if any(row["best_eval_loss"] is not None for row in rows.values()) else "least_loss"
    known = [row for row in rows.values() if row[measure] is not None]
    if len(known) > 1:
        best = min(known, key=lambda row: row[measure])
        what = "evaluation loss" if measure == "best_eval_loss" else "training loss"
        print(f"\nleast {what}: {best[measure]:.4f}, {best['run']}")
    found = [point for point in sweep.points if point.name in rows]
    _draw(sweep, [point for point in found if rows[point.name][measure] is not None], measure)
    print(
        f"{duration(sum(_seconds(point.directory) for point in found))} of training in {number_of(len(found), 'run')}"
    )


def _seconds(run: Path) -> float:
    from panda.hooks.metrics import read_metrics

    steps, last = 0.0, 0
    for record in read_metrics(run):
        if math.isfinite(record["step_seconds"]):
            steps += record["step_seconds"] * (record["step"] - last)
        last = record["step"]
    return steps


def _draw(sweep: Sweep, points: Sequence[Point], measure: str) -> None:
    from panda.hooks.curves import Recorded
    from panda.hooks.curves import draw_runs

    if not points:
        return
    metric = "eval_loss" if measure == "best_eval_loss" else "loss"
    picture = sweep.folder / "sweep.png"
    draw_runs([Recorded.read(point.directory, point.name) for point in points], picture, metric=metric, over="steps")
    print(picture)
