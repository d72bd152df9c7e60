"""``panda plot``: draws curves of runs beside each other, or the learning-rate schedule of a configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from panda.cli.command import run_command
from panda.cli.configured import configured
from panda.cli.parser import Parser
from panda.cli.run_folders import is_run
from panda.cli.run_folders import run_folders
from panda.cli.run_folders import short_names
from panda.configuration.configure import Configuration
from panda.files.terminal import number_of
from panda.files.whole import check_can_be_made
from panda.hooks.curves import X_AXES
from panda.hooks.curves import Recorded
from panda.hooks.curves import draw_runs
from panda.registry import UserError
from panda.registry.contexts import LRSchedulerContext
from panda.registry.location import resolve_path

USAGE = """\
usage: panda plot RUN [RUN ...] [--metric NAME] [--x steps|tokens|hours]
                  [--out FILE]
       panda plot schedule CONFIG [--out FILE] [--KEY VALUE ...] [-p no:NAME]

Draw a metric of runs beside each other, by default their loss, over steps,
into runs.png. Each RUN is the folder of a run, also of one that is still
training. NAME is an entry of its metrics.jsonl, such as eval_loss, grad_norm,
learning_rate or tokens_per_second.

Or draw the learning rate of every optimizer step of a configuration, by
default into schedule.png. Without max_steps the data is read and tokenised,
since it decides how many steps there are.

FILE ends in .png, .svg or .pdf.

examples:
  panda plot runs/first runs/second --metric eval_loss --x hours
  panda plot schedule panda:configs/instruct-tiny.yaml --lr_scheduler wsd"""

USUAL = ("loss", "eval_loss", "grad_norm", "learning_rate", "tokens_per_second")
"""Metrics of every run."""
FORMATS = (".png", ".svg", ".pdf")


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda plot``."""
    return run_command(_plot, argv)


def _plot(argv: list[str]) -> None:
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
    elif argv[:1] == ["schedule"]:
        _plot_schedule(argv[1:])
    else:
        _plot_runs(argv)


def parser() -> Parser:
    """The flags of ``panda plot RUN ...``."""
    parser = Parser(prog="panda plot", usage=USAGE.removeprefix("usage: "))
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--metric", default="loss")
    parser.add_argument("--x", choices=[*X_AXES], default="steps")
    parser.add_argument("--out", default="runs.png")
    parser.values |= {"metric": _metrics, "runs": lambda before: [] if before else ["schedule"]}
    return parser


def _metrics(before: Sequence[str]) -> list[str]:
    """The metrics that the runs among the words ``before`` have all on record."""
    folders = [resolve_path(word) for word in before if not word.startswith("-")]
    found = [Recorded.read(folder, folder.name).metrics for folder in folders if is_run(folder)]
    return [name for name in found[0] if all(name in each for each in found)] if found else [*USUAL]


def _plot_runs(argv: list[str]) -> None:
    arguments = parser().parse_args(argv)
    out = _checked_out(arguments.out)
    folders = run_folders(arguments.runs)
    runs = [Recorded.read(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]
    draw_runs(runs, out, metric=arguments.metric, over=arguments.x)
    for run in runs:
        _, values = run.curve(arguments.metric, arguments.x)
        finite = [value for value in values if math.isfinite(value)]
        shown = (
            f"first {finite[0]:.4g}, least {min(finite):.4g}, last {finite[-1]:.4g}" if finite else "no finite value"
        )
        print(f"{run.name}: {arguments.metric} {shown}, {number_of(len(values), 'record')}")
    print(out)


def _plot_schedule(argv: list[str]) -> None:
    flags, out = _without_out(argv)
    configuration = configured(flags, USAGE)
    if configuration is None:
        return
    resolved, total = configuration.resolved, _total_steps(configuration)
    peak = resolved.core.learning_rate
    chosen = resolved.components["lr_scheduler"]
    schedule = chosen.build(LRSchedulerContext(total_steps=total, learning_rate=peak), Callable)
    rates = [peak * schedule(completed) for completed in range(total)]
    draw_schedule(rates, out, title=f"{chosen.component.name}: {number_of(total, 'step')}")
    rising = rates.index(max(rates)) + 1
    up = f" at step {rising:,}, to which it rises" if rising > 1 else ", without a warm-up"
    print(f"{out}: {number_of(total, 'step')}, peak {max(rates):.3g}{up}; first {rates[0]:.3g}, last {rates[-1]:.3g}")


def _without_out(argv: list[str]) -> tuple[list[str], Path]:
    """``argv`` without ``--out FILE``, which is not a key of a run, and FILE."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--out=") else [word])]
    if "--out" not in words:
        return words, Path("schedule.png")
    at = words.index("--out")
    return words[:at] + words[at + 2 :], _checked_out(words[at + 1] if at + 1 < len(words) else "")


def _checked_out(text: str) -> Path:
    out = resolve_path(text) if text else Path()
    if out.suffix not in FORMATS or not out.parent.is_dir():
        raise UserError(f"--out: {text!r} is not a file in an existing folder that ends in {', '.join(FORMATS)}.")
    check_can_be_made(out, "--out")
    return out


def _total_steps(configuration: Configuration) -> int:
    options = configuration.options
    if options.max_steps > 0:
        return int(options.max_steps)
    from panda.run.first_look import look_for_inputs
    from panda.run.first_look import planned_world_size

    look_for_inputs(configuration)

    from panda.run.assembly import lay_out
    from panda.run.preparation import Preparation

    copies = max(1, planned_world_size(configuration) // options.tensor_parallel_size)
    return max(1, lay_out(options, Preparation(configuration).dataset, copies).plan.total_steps)


def draw_schedule(rates: list[float], path: Path, *, title: str) -> None:
    """Draw ``rates``, the learning rate of each step, into ``path``."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 3.5), dpi=150, layout="constrained")
    axes: Any = figure.add_subplot()
    axes.plot(range(1, len(rates) + 1), rates, color="C0", marker="." if len(rates) < 30 else None)
    rising = rates.index(max(rates)) + 1
    if rising > 1:
        axes.axvline(rising, color="0.5", linestyle=":", linewidth=1.2, label=f"the peak, at step {rising:,}")
        axes.legend(loc="best")
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.set_ylabel("learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_title(title, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
