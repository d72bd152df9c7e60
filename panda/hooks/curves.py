"""Curves of runs as pictures: one run with all that its records say, and several runs beside each other.

Axes are scaled to the curve without its spikes, which would press the rest of it into a line. What lies beyond the
frame is marked at its edge, never left out without a sign, and is no part of the smoothed curve.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

from panda.files.terminal import number_of
from panda.hooks.metrics import read_evaluations
from panda.hooks.metrics import read_metrics
from panda.registry import UserError
from panda.registry.errors import did_you_mean

SMOOTHED = 1 / 50
"""Width of the smoothed curve's kernel, its standard deviation, as a share of the records."""
POINTS = 400
"""Of a smoothed curve, at most."""
FEW = 20
"""Below this many, each record is marked and nothing is smoothed."""
WINDOW = 5
"""Records whose median stands for them in the scale of an axis: fewer than half of them in a row are a spike."""
ROOM, NOISE = 0.15, 3
"""How far a value may lie outside of the medians to be within the frame: a share of their height, or so many times the
distance from its median that nine of ten values keep."""
DECADE = 10
"""Largest value over the smallest from which an axis is logarithmic."""

X_AXES = {
    "steps": "optimizer step",
    "tokens": "tokens",
    "hours": "hours of training, without evaluations and saves",
}
"""What curves may be drawn over, and the labels."""


@dataclass(frozen=True)
class Limits:
    """The part of an axis that is shown."""

    low: float
    high: float
    is_log: bool

    @classmethod
    def of(cls, *curves: Iterable[float]) -> Limits | None:
        """Those for ``curves``, each in its order; None where they have no finite number."""
        finite = [[value for value in values if math.isfinite(value)] for values in curves]
        everything = [value for values in finite for value in values]
        if not everything:
            return None
        medians = [median for values in finite for median in _medians(values)]
        is_log = min(everything) > 0 and max(medians) >= DECADE * min(medians)
        scaled, back = (math.log, math.exp) if is_log else (float, float)
        least, most = scaled(min(medians)), scaled(max(medians))
        away = sorted(abs(scaled(one) - scaled(other)) for one, other in zip(everything, medians, strict=True))
        around = max(ROOM * (most - least), NOISE * away[9 * len(away) // 10])
        low = max(least - around, scaled(min(everything)))
        high = min(most + around, scaled(max(everything)))
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(back(low - room), back(high + room), is_log)

    def inside(self, values: Iterable[float]) -> list[float]:
        """``values``, with NaN for those beyond."""
        return [value if self.low <= value <= self.high else math.nan for value in values]


@dataclass(frozen=True)
class Recorded:
    """What is on record of a run."""

    name: str
    records: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]] = field(default=())

    @classmethod
    def read(cls, directory: Path, name: str) -> Recorded:
        """That of the run in ``directory``, which a picture calls ``name``."""
        return cls(name, read_metrics(directory), read_evaluations(directory))

    @property
    def metrics(self) -> list[str]:
        """What there are curves of, by name."""
        records = (*self.records, *self.evaluations)
        numbers = (key for record in records for key, value in record.items() if isinstance(value, (int, float)))
        return sorted({*numbers} - {"step"})

    def curve(self, metric: str, over: str) -> tuple[list[float], list[float]]:
        """The values of ``metric``, and where each stands on the axis ``over``. Raises UserError if it has none."""
        for records in (self.records, self.evaluations):
            known = [record for record in records if metric in record]
            if known:
                place = self._places(over)
                return [place(record["step"]) for record in known], values_of(known, metric)
        near = did_you_mean(metric, self.metrics)
        raise UserError(
            f"--metric: {self.name} has no {metric!r} on record.{near} It has {', '.join(self.metrics) or 'nothing'}."
        )

    def _places(self, over: str) -> Any:
        """Where a step stands on the axis ``over``; between two records in proportion."""
        if over == "steps":
            return float
        key = "tokens" if over == "tokens" else "step_seconds"
        steps, places = [0], [0.0]
        for record, value in zip(self.records, values_of(self.records, key), strict=True):
            passed = record["step"] - steps[-1]
            if passed > 0 and math.isfinite(value):
                steps.append(record["step"])
                places.append(value if over == "tokens" else places[-1] + passed * value / 3600)

        def place(step: int) -> float:
            right = bisect_left(steps, step)
            if right in (0, len(steps)):
                return places[0 if right == 0 else -1]
            (left, until), (low, high) = steps[right - 1 : right + 1], places[right - 1 : right + 1]
            return low + (high - low) * (step - left) / (until - left)

        return place


def values_of(records: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """The values of ``key``; those that were not finite numbers, which are None in records, are NaN."""
    return [_number(record.get(key)) for record in records]


def _number(value: Any) -> float:
    """``value`` of a record, which may have been damaged, as a number."""
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return math.inf if value > 0 else -math.inf


def _medians(values: Sequence[float]) -> list[float]:
    """The median of the values around each, fewer at the ends."""
    reach = WINDOW // 2
    around = (values[max(0, at - reach) : at + reach + 1] for at in range(len(values)))
    return [statistics.median_low(some) for some in around]


def smoothed(places: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """A curve through ``values``, which are NaN in gaps: at each point that of the line which fits them best around it.

    Such a line follows a trend up to its ends, where averages of the past or of both sides lag or bend. Cleveland,
    Robust Locally Weighted Regression (1979), here with a Gaussian kernel over the number of the record.
    """
    import numpy as np

    numbers, found = np.arange(len(values), dtype=float), np.asarray(values, dtype=float)
    width = max(2.0, SMOOTHED * len(values))
    centres = sorted({round(centre) for centre in np.linspace(0, len(values) - 1, POINTS)})
    curve = []
    for centre in centres:
        near = slice(max(0, int(centre - 4 * width)), int(centre + 4 * width) + 1)
        offsets, around = numbers[near] - centre, found[near]
        known = np.isfinite(around)
        if not np.isfinite(found[centre]) or known.sum() < 2:
            curve.append(math.nan)
            continue
        offsets, around = offsets[known], around[known]
        weights = np.exp(-0.5 * (offsets / width) ** 2)
        slope_and_height = np.polyfit(offsets, around, 1, w=np.sqrt(weights))
        curve.append(float(slope_and_height[1]))
    return [places[centre] for centre in centres], curve


def draw_run(run: Recorded, path: Path, *, unit: str = "supervised_tokens") -> None:
    """Draw the loss of ``run``, for each ``unit``, and small the learning rate, the gradient norm and skipped steps."""
    figure = new_figure(8, 6)
    steps = [record["step"] for record in run.records]
    skipped = [sum(record.get(key, 0) for key in ("skipped_steps", "left_out_steps")) for record in run.records]
    small = ["learning_rate", "grad_norm", *(["skipped"] if any(skipped) else [])]
    axes = figure.subplot_mosaic([["loss"] * len(small), small], height_ratios=[3, 1])
    losses = values_of(run.records, "loss")
    limits = _draw_curve(axes["loss"], steps, losses, "loss", also=values_of(run.evaluations, "eval_loss"))
    if run.evaluations:
        _draw_evaluations(axes["loss"], run.evaluations)
    axes["loss"].set_ylabel(f"loss per {unit.removesuffix('s').replace('_', ' ')}")
    axes["loss"].legend(loc="best")
    last = next((value for value in reversed(losses) if math.isfinite(value)), math.nan)
    axes["loss"].set_title(f"{run.name}: loss {losses[0]:.4g} → {last:.4g}{_span(limits)}", parse_math=False)
    norms = values_of(run.records, "grad_norm")
    _draw_small(axes["grad_norm"], steps, norms, "gradient norm")
    limits = Limits.of(norms)
    _mark_beyond(axes["grad_norm"], steps, norms, limits, "0.35")
    _frame(axes["grad_norm"], limits)
    _draw_small(axes["learning_rate"], steps, values_of(run.records, "learning_rate"), "learning rate")
    axes["learning_rate"].set_ylim(bottom=0)
    axes["learning_rate"].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if any(skipped):
        axes["skipped"].step(steps, skipped, where="post", color="C3", linewidth=1)
        axes["skipped"].set_title("skipped steps", fontsize="medium")
        axes["skipped"].yaxis.get_major_locator().set_params(integer=True)
    for each in axes.values():
        dress(each, X_AXES["steps"])
    figure.savefig(path)


def draw_runs(runs: Sequence[Recorded], path: Path, *, metric: str, over: str) -> None:
    """Draw ``metric`` of each of ``runs`` over ``over``, one of ``X_AXES``. The form follows the ending of ``path``.

    Raises UserError for a run that has no such metric on record.
    """
    curves = [run.curve(metric, over) for run in runs]
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    limits = Limits.of(*(values for _, values in curves))
    for number, (run, (places, values)) in enumerate(zip(runs, curves, strict=True)):
        color = f"C{number % 10}"
        style = ["-", "--", ":", "-."][number // 10 % 4]
        if len(values) < FEW:
            axes.plot(places, values, style, color=color, marker=".", label=run.name)
        else:
            axes.plot(places, values, color=color, alpha=0.2, linewidth=0.8)
            axes.plot(*_smoothed_inside(places, values, limits), style, color=color, label=run.name)
        _mark_beyond(axes, places, values, limits, color)
    _frame(axes, limits)
    axes.set_ylabel(metric.replace("_", " "))
    axes.legend(loc="best", fontsize="small" if len(runs) > 6 else "medium")
    dress(axes, X_AXES[over], whole=over == "steps")
    figure.savefig(path)


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _draw_curve(
    axes: Any, steps: Sequence[float], values: Sequence[float], name: str, *, also: Sequence[float]
) -> Limits | None:
    """Draw ``values``, and a smoothed curve where there are enough, in a frame for these and the values ``also``."""
    limits = Limits.of(values, also)
    if len(values) < FEW:
        axes.plot(steps, values, color="C0", marker=".", label=name)
    else:
        axes.plot(steps, values, color="C0", alpha=0.35, linewidth=1, label=name)
        axes.plot(*_smoothed_inside(steps, values, limits), color="C0", label="smoothed")
    _mark_beyond(axes, steps, values, limits, "C0", label=True)
    _frame(axes, limits)
    return limits


def _smoothed_inside(
    places: Sequence[float], values: Sequence[float], limits: Limits | None
) -> tuple[list[float], list[float]]:
    return smoothed(places, limits.inside(values) if limits else values)


def _draw_evaluations(axes: Any, evaluations: Sequence[Mapping[str, Any]]) -> None:
    steps, losses = [record["step"] for record in evaluations], values_of(evaluations, "eval_loss")
    axes.plot(steps, losses, color="C1", marker="o", markersize=4, label="evaluation")
    finite = [(loss, step) for loss, step in zip(losses, steps, strict=True) if math.isfinite(loss)]
    if finite:
        loss, step = min(finite)
        axes.plot(
            [step],
            [loss],
            "*",
            color="C1",
            markersize=14,
            markeredgecolor="white",
            label=f"best: {loss:.4g} at step {step}",
        )


def _draw_small(axes: Any, steps: Sequence[float], values: Sequence[float], name: str) -> None:
    axes.plot(steps, values, color="0.35", linewidth=1, marker="." if len(values) < FEW else None)
    axes.set_title(name, fontsize="medium")


def _mark_beyond(
    axes: Any,
    places: Sequence[float],
    values: Sequence[float],
    limits: Limits | None,
    color: str,
    *,
    label: bool = False,
) -> None:
    """Mark at the edge of the frame the values beyond it, and those that are no numbers at its top."""
    if limits is None:
        return
    above = [place for place, value in zip(places, values, strict=True) if not value <= limits.high]
    below = [place for place, value in zip(places, values, strict=True) if value < limits.low]
    for found, height, marker, what in ((above, 0.985, "^", "above, or not finite"), (below, 0.015, "v", "below")):
        if found:
            name = f"{what}: {number_of(len(found), 'record')}" if label else None
            transform = axes.get_xaxis_transform()
            heights = [height] * len(found)
            axes.plot(found, heights, marker, color=color, markersize=5, transform=transform, label=name, zorder=6)


def _frame(axes: Any, limits: Limits | None) -> None:
    if limits is None:
        return
    if limits.is_log:
        axes.set_yscale("log")
    axes.set_ylim(limits.low, limits.high)


def _span(limits: Limits | None) -> str:
    return ", on a logarithmic scale" if limits and limits.is_log else ""


def dress(axes: Any, x_label: str, *, whole: bool = True) -> None:
    """Give ``axes`` the look of all pictures; with ``whole``, whole numbers on the axis ``x_label``."""
    from matplotlib.ticker import MaxNLocator
    from matplotlib.ticker import ScalarFormatter

    axes.set_xlabel(x_label)
    low, high = axes.get_xlim()
    if whole and high - low < 2:  # of one record: else the axis would have parts of a step
        axes.set_xlim(round((low + high) / 2) - 1, round((low + high) / 2) + 1)
    if isinstance(axes.yaxis.get_major_formatter(), ScalarFormatter):
        axes.yaxis.get_major_formatter().set_useOffset(False)  # `+2` over an axis is overlooked
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
