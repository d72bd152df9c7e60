"""``panda runs``: the runs in a folder, how far they are, and how good."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from panda.cli.command import run_command
from panda.cli.parser import Parser
from panda.cli.run_folders import is_described
from panda.cli.run_folders import runs_below
from panda.files.terminal import printable_line
from panda.registry import UserError
from panda.registry.location import resolve_path
from panda.run.best_evaluation import best_evaluation
from panda.run.description import read_provenance
from panda.run.directory import configuration_in
from panda.run.directory_lock import is_in_use

ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "run": lambda row: str(row["run"]),
    "status": lambda row: str(row["status"]),
    "step": lambda row: f"{row['step']:,}" + (f"/{row['total_steps']:,}" if row["total_steps"] else ""),
    "loss": lambda row: _loss(row["loss"]),
    "least": lambda row: _loss(row["least_loss"]),
    "eval": lambda row: _loss(row["eval_loss"]),
    "best eval": lambda row: _loss(row["best_eval_loss"]),
    "best": lambda row: _best(row),
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "",
    "age": lambda row: _age(row["age_seconds"]),
}
"""The columns, and what a row says in each."""
TEXTS = {"run": 20, "status": 12}
"""Columns of texts, which are set to the left, and to how few characters a narrow terminal may have them wrapped."""
LEFT_OUT = ("least", "eval", "tokens/s", "age")
"""Columns that a narrow terminal is not shown, the first ones first."""
SORTED = {"age": "age_seconds", "loss": "loss", "eval": "best_eval_loss", "run": "run"}
"""What rows are sorted by, from the least."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda runs``."""
    return run_command(_runs, argv)


def parser() -> Parser:
    """The flags of ``panda runs``."""
    parser = Parser(
        prog="panda runs",
        description="List the runs in a folder and its folders: whether they train, have finished or were interrupted,"
        " how far they are, the last and the least loss (training, and evaluation where there is one), speed, and the"
        " time since they last wrote something.",
        epilog="example: panda runs runs --sort eval",
    )
    parser.add_argument("folder", nargs="?", default="runs", metavar="DIR", help="by default %(default)s")
    parser.add_argument("--sort", choices=[*SORTED], default="age", help="by default the latest come first")
    parser.add_argument("--json", action="store_true", help="one JSON array of objects")
    return parser


def _runs(argv: list[str]) -> None:
    arguments = parser().parse_args(argv)
    folder = resolve_path(arguments.folder)
    if not folder.is_dir():
        raise UserError(f"{arguments.folder}: no such folder. Name the one that has your runs: panda runs DIR.")
    key = SORTED[arguments.sort]
    found = [*[folder] * is_described(folder), *runs_below(folder)]
    rows = sorted((described(run, folder) for run in found), key=lambda row: _place(row[key]))
    if arguments.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif rows:
        print_table(rows, folder)
    else:
        print(f"no runs in {printable_line(str(folder))}")


def described(run: Path, folder: Path) -> dict[str, Any]:
    """A row for ``run``, which is ``folder`` or somewhere in it."""
    from panda.hooks.metrics import read_evaluations
    from panda.hooks.metrics import read_metrics

    records, evaluations, provenance = read_metrics(run), read_evaluations(run), read_provenance(run)
    total = provenance.get("total_steps")
    last: dict[str, Any] = records[-1] if records else {}
    losses, evaluated = (_finite(found, key) for found, key in ((records, "loss"), (evaluations, "eval_loss")))
    best = best_evaluation(run, evaluations)
    touched = max(path.stat().st_mtime for path in (run, *run.glob("*.json*")))
    return {
        "run": str(run.relative_to(folder)) if run != folder else run.resolve().name,
        "status": _status(run, provenance, last),
        "step": last.get("step", 0),
        "total_steps": total if isinstance(total, int) else None,
        "loss": last.get("loss"),
        "least_loss": min(losses, default=None),
        "eval_loss": evaluated[-1] if evaluated else None,
        "best_eval_loss": min(evaluated, default=None),
        "best_metric": best.metric if best else None,
        "best_value": best.value if best else None,
        "best_step": best.step if best else None,
        "higher_is_better": best.higher if best else None,
        "tokens_per_second": last.get("tokens_per_second"),
        "task": configuration_in(run).get("task"),
        "age_seconds": max(0, round(time.time() - touched)),
    }


def _status(run: Path, provenance: dict[str, Any], last: dict[str, Any]) -> str:
    """What is known of ``run``; of one on another machine that holds no lock here, what it has written."""
    if is_in_use(run):
        return "training" if last else "starting"
    end = provenance.get("end")
    if isinstance(end, dict):
        return "stopped early" if end.get("stopped") else "finished"
    if _ended_on_skipped(run, provenance, last):
        return "ended on skipped steps"
    saved = any((run / "checkpoints").glob("step-*"))
    return "interrupted" if saved else "ended without a checkpoint"


def _ended_on_skipped(run: Path, provenance: dict[str, Any], last: dict[str, Any]) -> bool:
    """Whether ``run`` ended since its last steps were skipped, which no resumption of it as it is can help."""
    from panda.hooks.guard import batches_of
    from panda.hooks.guard import read_skipped

    step = max(read_skipped(run), default=0)
    return 0 < step >= last.get("step", 0) and (step == provenance.get("total_steps") or bool(batches_of(run, step)))


def print_table(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Of runs in ``folder``: the columns that ``rows`` have something for, as many as a terminal has room for."""
    cells = {name: [printable_line(shown(row)) for row in rows] for name, shown in ROWS.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    widths = {name: max(len(name), *map(len, column)) for name, column in cells.items()}
    left_out: list[str] = []
    if sys.stdout.isatty():
        widths, left_out = _fitting(widths, shutil.get_terminal_size().columns - 1)
    for number in range(-1, len(rows)):
        row = {name: name if number < 0 else cells[name][number] for name in widths}
        wrapped = [_in_lines(row[name], width) if name in TEXTS else [row[name]] for name, width in widths.items()]
        for line in zip_longest(*wrapped, fillvalue=""):
            sides = zip(line, widths.items(), strict=True)
            texts = [f"{text:{'<' if name in TEXTS else '>'}{width}}" for text, (name, width) in sides]
            print("  ".join(texts).rstrip())
    if left_out:
        print(f"no room for: {', '.join(left_out)} (`panda runs {shlex.quote(str(folder))} --json` has all)")
    sys.stdout.flush()


def _fitting(widths: dict[str, int], room: int) -> tuple[dict[str, int], list[str]]:
    """The columns that ``room`` characters have room for, with their widths, and those left out.

    Texts are wrapped before a column is left out: that loses nothing.
    """
    left_out: list[str] = []
    can_be_left_out = [name for name in LEFT_OUT if name in widths]
    while True:
        shown = {name: width for name, width in widths.items() if name not in left_out}
        over = sum(shown.values()) + 2 * (len(shown) - 1) - room
        for name, least in TEXTS.items():
            less = max(0, min(over, shown[name] - least))
            shown[name] -= less
            over -= less
        if over <= 0 or not can_be_left_out:
            return shown, left_out
        left_out.append(can_be_left_out.pop(0))


def _in_lines(text: str, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` characters, broken after a character that ends a part of a name if any."""
    lines = []
    while len(text) > width:
        where = range(width, width // 2, -1)
        at = next((at for ends in ("/, ", "-_+") for at in where if text[at - 1] in ends), width)
        lines.append(text[:at].rstrip())
        text = text[at:]
    return [*lines, text]


def _finite(records: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [record[key] for record in records if record[key] is not None and math.isfinite(record[key])]


def _best(row: dict[str, Any]) -> str:
    """The best value of what the run compares evaluations by, where that is not their loss."""
    metric = row["best_metric"]
    return f"{row['best_value']:.4g} {metric.removeprefix('eval_')}" if metric not in (None, "eval_loss") else ""


def _place(value: Any) -> tuple[bool, Any]:
    """Where a row is sorted: those without a value last."""
    return value is None, value if value is not None else 0


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
