"""The ``plot`` plugin: ``loss.png``, the loss and the learning rate over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from panda.hooks.metrics import read_evaluations
from panda.hooks.metrics import read_metrics
from panda.registry import NoOptions
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext

if TYPE_CHECKING:
    from panda.runner import Run

SMOOTHING = 0.9
"""Weight of the past in the smoothed curve."""
FEW = 20
"""Below this many, each record is marked and there is no moving average: it would still be close to the first."""


@register_plugin("plot")
class Plot:
    """Draws loss.png, loss and learning rate over steps, when the run ends, in whatever way."""

    acts = False  # it only watches

    def __init__(self, options: NoOptions, context: PluginContext) -> None:
        self.records: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        if run.processes.rank == 0:
            self.records, self.evaluations = (
                [record for record in read(run.directory) if record["step"] <= run.step]
                for read in (read_metrics, read_evaluations)
            )

    @hookimpl
    def panda_log(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    @hookimpl
    def panda_evaluation(self, record: dict[str, Any]) -> None:
        self.evaluations.append(record)

    @hookimpl
    def panda_run_end(self, run: Run) -> None:
        self._draw(run)

    @hookimpl
    def panda_exception(self, run: Run) -> None:
        self._draw(run)

    def _draw(self, run: Run) -> None:
        if self.records:  # on rank 0
            draw_loss(self.records, run.directory / "loss.png", title=run.directory.name, evaluations=self.evaluations)


def draw_loss(
    records: list[dict[str, Any]], path: Path, *, title: str, evaluations: Sequence[dict[str, Any]] = ()
) -> None:
    """Draw loss, its moving average and the learning rate of ``records``, and the loss of ``evaluations``, over steps
    into ``path``."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [record["step"] for record in records]
    losses = _values(records, "loss")
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    rate_axes = axes.twinx()
    [rate] = rate_axes.plot(steps, [record["learning_rate"] for record in records], color="0.75", linewidth=1)
    if len(losses) < FEW:
        curves = axes.plot(steps, losses, color="C0", marker=".", label="loss")
    else:
        curves = [
            *axes.plot(steps, losses, color="C0", alpha=0.35, linewidth=1, label="loss"),
            *axes.plot(steps, _smoothed(losses), color="C0", label="moving average"),
        ]
    if evaluations:
        evaluated = [record["step"] for record in evaluations]
        losses_there = _values(evaluations, "eval_loss")
        curves += axes.plot(evaluated, losses_there, color="C1", marker="o", markersize=4, label="evaluation")
    rate.set_label("learning rate")
    rate_axes.set_ylabel("learning rate", color="0.5")
    rate_axes.tick_params(colors="0.5")
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate_axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.set_ylabel("loss per supervised token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_title(f"{title}: loss {losses[0]:.3f} → {losses[-1]:.3f}", parse_math=False)
    axes.legend(handles=[*curves, rate], loc="upper right")
    for each in (axes, rate_axes):
        each.spines[["top", "right"]].set_visible(False)
    axes.set_zorder(rate_axes.get_zorder() + 1)  # the loss is drawn over the learning rate
    axes.patch.set_visible(False)
    figure.savefig(path, format="png")


def _values(records: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [math.nan if record[key] is None else record[key] for record in records]


def _smoothed(values: list[float]) -> list[float]:
    """Exponential moving average without bias towards its start."""
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isnan(value):  # a gap, and the average continues after it
            smoothed.append(value)
            continue
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(mean / weight)
    return smoothed
