"""Trains as a user does, by the real command, and reads what came of it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panda.files.terminal import number_of
from panda.hooks.metrics import read_evaluations
from panda.hooks.metrics import read_metrics
from panda.testing.processes import run_script
from panda.testing.processes import start

NOTHING_DRAWN = ("-p", "no:plot", "-p", "no:tensorboard")
"""Drawing a plot takes longer than the steps that it shows."""

ZERO3_AT_ONCE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}


@dataclass(frozen=True)
class Trained:
    """A run that ended, or a command that was refused."""

    directory: Path
    printed: str
    """What it printed, its errors last."""

    @property
    def records(self) -> list[dict[str, Any]]:
        """The log records, as ``metrics.jsonl`` has them."""
        return read_metrics(self.directory)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The records of the evaluations."""
        return read_evaluations(self.directory)

    @property
    def losses(self) -> list[float]:
        """The loss of each record."""
        return [record["loss"] for record in self.records]

    @property
    def export(self) -> Path:
        """The folder of the exported model."""
        return self.directory / "export"


AS_COMMANDS = {"PYTHONSAFEPATH": "1"}
"""Else a folder of a project in the current one would hide the package of that name, which is installed from it."""


def train(
    directory: Path,
    *flags: str,
    ranks: int = 1,
    fails: bool = False,
    variables: Mapping[str, str] | None = None,
    **options: object,
) -> Trained:
    """Run ``panda-train`` with ``flags`` and ``options`` on ``ranks`` processes, as torchrun starts them.

    ``directory`` is the run's. It begins in the current folder, as a command does. A list among the options is one flag
    with several values. Nothing is drawn or sent to TensorBoard, there is no display of progress, and every step is
    recorded unless ``logging_steps`` says otherwise. ``variables`` are added to the environment.

    Raises AssertionError with all that was printed where the command fails, or, with ``fails``, where it does not.
    """
    directory = directory.absolute()
    options = {"logging_steps": 1} | options
    argv = [*flags, *as_flags(options), "--output_dir", str(directory), *NOTHING_DRAWN, "-p", "no:progress"]
    directory.parent.mkdir(parents=True, exist_ok=True)
    several = ranks if ranks > 1 else 0
    added = AS_COMMANDS | dict(variables or {})
    with start("panda.cli.train", *argv, cwd=Path.cwd(), ranks=several, serving=False, **added) as started:
        done = started.wait()
    printed = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, f"panda-train {' '.join(argv)}\n{printed}"
    return Trained(directory, printed)


def as_flags(options: Mapping[str, object]) -> list[str]:
    """``options`` as the flags of a command."""
    words: list[str] = []
    for key, value in options.items():
        several = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{key}", *(str(each).lower() if isinstance(each, bool) else str(each) for each in several)]
    return words


def train_several(configurations: Sequence[Sequence[object]], *, ranks: int = 1, cwd: Path, **variables: str) -> str:
    """Train each of ``configurations``, the flags of a run, one after another in one process group; what they printed.

    Starting one takes seconds. Raises AssertionError where one fails.
    """
    given = json.dumps([list(map(str, argv)) for argv in configurations])
    return run_script("panda.testing.train_many", given, cwd=cwd, ranks=ranks, **variables)


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    refused: str = ""
    """The message of the UserError that ended it."""
    failed: str = ""
    """The end of the output of the processes, which it ended."""


def train_each(configurations: Sequence[Sequence[object]], *, ranks: int = 1, cwd: Path) -> list[Outcome]:
    """Train each of ``configurations``, as ``train_several`` does, also where some are refused or fail.

    After one that ends the processes, the others begin in new ones.
    """
    outcomes: list[Outcome] = []
    while left := [list(map(str, argv)) for argv in configurations[len(outcomes) :]]:
        with tempfile.TemporaryDirectory(prefix="panda-testing-outcomes-") as folder:
            argv, several = (json.dumps(left), folder), ranks if ranks > 1 else 0
            with start("panda.testing.train_many", *argv, cwd=cwd, ranks=several) as started:
                done = started.wait()
            ended = [file for number in range(len(left)) if (file := Path(folder, f"{number}")).exists()]
            outcomes += [Outcome(refused=file.read_text()) for file in ended]
        if done.returncode != 0 or len(ended) < len(left):
            # The one that rank 0 was in; the last one where another rank failed after rank 0 had ended.
            failed = Outcome(failed=(done.stdout + done.stderr)[-2000:])
            outcomes = [*outcomes[: len(configurations) - 1], failed]
    return outcomes


def zero3_at_once(folder: Path) -> dict[str, Any]:
    """Options of a run with ZeRO-3 that partitions every weight, and releases it as soon as it has been used.

    By default it keeps the weights of such small models whole, and code that needs them gathered would not be tested.
    Writes a file to ``folder``.
    """
    file = folder / "zero3_at_once.json"
    file.write_text(json.dumps({"zero_optimization": ZERO3_AT_ONCE}))
    return {"zero_stage": 3, "deepspeed_config": file}


def same_losses(
    found: Sequence[float | None], expected: Sequence[float | None], tolerance: float = 1e-5
) -> tuple[bool, str]:
    """Whether losses are the same to a relative ``tolerance``, and in words how far they are apart."""
    if len(found) != len(expected):
        return False, f"{len(found)} losses instead of {len(expected)}"
    if not all(isinstance(each, (int, float)) for each in (*found, *expected)):
        return False, f"losses that are not finite: {found}, and {expected}"
    pairs = zip(found, expected, strict=True)
    far = max((abs(a - b) / max(abs(b), 1e-12) for a, b in pairs), default=0.0)  # type: ignore[operator, arg-type]
    several = number_of(len(found), "loss", "losses")
    return far <= tolerance, f"{several}, apart by {far:.1g} of their size (at most {tolerance:.0g})"
