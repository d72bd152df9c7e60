"""``panda plot``: draws the learning-rate schedule of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from panda.cli.command import run_command
from panda.cli.configured import configured
from panda.configuration.configure import Configuration
from panda.files.whole import check_can_be_made
from panda.registry import UserError
from panda.registry.contexts import LRSchedulerContext

USAGE = """\
usage: panda plot schedule CONFIG [--out FILE.png] [--KEY VALUE ...] [-p no:NAME]

Draw the learning rate of every optimizer step of a run, by default into schedule.png. Without
max_steps the data is read and tokenised, since it decides how many steps there are.

example: panda plot schedule panda:configs/instruct-tiny.yaml --lr_scheduler wsd --max_steps 1000"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda plot``."""
    return run_command(_plot, argv)


def _plot(argv: list[str]) -> None:
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    if argv[:1] != ["schedule"]:
        raise UserError(f"expected `schedule`, the only thing that it draws.\n{USAGE}")
    flags, out = _without_out(argv[1:])
    configuration = configured(flags, USAGE)
    if configuration is None:
        return
    resolved, total = configuration.resolved, _total_steps(configuration)
    peak = resolved.core.learning_rate
    chosen = resolved.components["lr_scheduler"]
    schedule = chosen.build(LRSchedulerContext(total_steps=total, learning_rate=peak), Callable)
    rates = [peak * schedule(completed) for completed in range(total)]
    draw_schedule(rates, out, title=f"{chosen.component.name}: {total:,} steps")
    print(f"{out}: {total:,} steps, peak {max(rates):.3g}, first {rates[0]:.3g}, last {rates[-1]:.3g}")


def _without_out(argv: list[str]) -> tuple[list[str], Path]:
    """``argv`` without ``--out FILE``, which is not a key of a run, and FILE."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--out=") else [word])]
    if "--out" not in words:
        return words, Path("schedule.png")
    at = words.index("--out")
    out = Path(words[at + 1]) if at + 1 < len(words) else Path()
    if out.suffix != ".png" or not out.parent.is_dir():
        raise UserError(f"--out: {str(out)!r} is not a .png file in an existing folder.")
    check_can_be_made(out, "--out")
    return words[:at] + words[at + 2 :], out


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
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.set_ylabel("learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_title(title, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")
