"""Curves as HTML: a picture by itself, and the points from which ``page.js`` shows a part of it larger.

Paths are drawn on a grid of ``GRID`` by ``GRID``, which is stretched to the frame. Axes and labels are elements beside
it, so that text keeps its size on any screen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from panda.hooks.curves import FEW
from panda.hooks.curves import X_AXES
from panda.hooks.curves import Limits
from panda.hooks.curves import Recorded
from panda.hooks.curves import smoothed
from panda.hooks.curves import values_of
from panda.registry import UserError
from panda.report.html import Html
from panda.report.html import element
from panda.report.html import html

GRID = 100_000
BEYOND = 100 * GRID
"""Points further off than this are drawn here: what they are is not shown."""
MANY = 200
"""From so many records on, curves are smoothed, too, besides that of the loss."""
BUCKETS = 600
"""Of a curve with more than two points for each, the highest and the lowest of each are kept."""
TICKS = 6
"""Of an axis, about."""
COLORS = 10
MOST = 24
"""Charts of a page; other metrics are named."""

LOSS, EVALUATION = "loss", "eval_loss"
TITLES = {
    LOSS: "loss",
    EVALUATION: "evaluation loss",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "skipped": "steps that were skipped or left out, since the run began",
    "tokens_per_second": "tokens a second",
    "data_wait": "share of the time spent waiting for data",
    "memory_gib": "memory of a GPU, in GiB",
    "mfu": "share of the GPUs' peak operations (MFU)",
    "router_loss": "loss of the routers",
}
"""Those of charts, in their order; those of further metrics are their names."""
NO_CURVES = {
    *("step", "tokens", "skipped_steps", "left_out_steps", "step_seconds", "seconds", "save_seconds"),
    *("resume_seconds", "eval_seconds", "eval_tokens"),
}


@dataclass(frozen=True)
class Curve:
    """A line of a chart."""

    name: str
    places: Sequence[float]
    values: Sequence[float]
    """NaN where there is a gap."""
    color: int
    kind: str
    """``raw``, ``smooth``, or ``dots`` where each point is marked."""
    listed: bool = True
    """Whether the legend names it."""
    has_best: bool = False
    """Whether its least value is the best one, which is marked."""


@dataclass(frozen=True)
class Scale:
    """Where a value stands on an axis."""

    low: float
    high: float
    is_log: bool = False

    def place(self, value: float) -> int:
        """That of ``value``, from 0 to ``GRID`` where it is within the axis."""
        if self.is_log and value <= 0:
            return -BEYOND
        share = (self._scaled(value) - self._scaled(self.low)) / (self._scaled(self.high) - self._scaled(self.low))
        return round(min(max(share * GRID, -BEYOND), BEYOND))

    def ticks(self) -> list[float]:
        """Round numbers within the axis, a few more than ``TICKS`` at most."""
        if self.is_log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1,)):
                found = [d * 10.0**p for p in powers for d in digits if self.low <= d * 10.0**p <= self.high]
                if 2 <= len(found) <= TICKS + 2:
                    return found
            if len(found) > TICKS + 2:
                return found[:: -(-len(found) // TICKS)]
        step = _round_step((self.high - self.low) / TICKS)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.is_log else value


def _round_step(least: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least * (1 - 1e-9))


def label(value: float) -> str:
    """``value`` in few characters: 25k, 1.5M, 2e-4."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for least, unit, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= least:
            return f"{value / unit:.4g}{suffix}"
    return f"{value:.4g}"


def charts(runs: Sequence[Recorded], over: str = "steps") -> Html:
    """Charts of all that ``runs`` have on record, over ``over``, one of ``X_AXES``."""
    metrics = list(_metrics(runs))
    curves = {metric: found for metric in metrics[:MOST] if (found := _curves(runs, metric, over))}
    places = [place for found in curves.values() for curve in found for place in curve.places]
    if not places:
        return element("p", "No step is on record yet.")
    low, high = min(0.0, *places), max(places)
    across = Scale(low, high if high > low else low + 1)
    drawn = [_chart(metric, found, across, over) for metric, found in curves.items()]
    others = metrics[MOST:]
    more = element("p", "On record, and not drawn: ", ", ".join(others), ".") if others else ""
    hint = element(
        "p",
        "Drag across a curve to see that part of all of them larger, double-click to see all again. With the keyboard:"
        " Tab, then arrows, + and -, and 0.",
        class_="hint",
    )
    return html(hint, element("div", *drawn, class_="charts"), more)


def _metrics(runs: Sequence[Recorded]) -> Iterator[str]:
    """The metrics of ``runs`` that are drawn, in order."""
    found: dict[str, None] = {}
    for run in runs:
        for records in (run.records, run.evaluations):
            keys = dict.fromkeys(key for record in records for key in record)
            found |= dict.fromkeys(key for key in keys if key not in NO_CURVES and _is_metric(records, key))
    if any(_skipped(run)[-1:] > [0.0] for run in runs):
        found["skipped"] = None
    if len(runs) == 1 and LOSS in found:
        found.pop(EVALUATION, None)  # beside the loss
    yield from (metric for metric in TITLES if metric in found)
    yield from (metric for metric in found if metric not in TITLES)


def _is_metric(records: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether ``key`` has numbers, and does not only count."""
    values = [record[key] for record in records if record.get(key) is not None]
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    counts = all(isinstance(value, int) for value in numbers) and numbers == sorted(numbers)
    return bool(numbers) and len(numbers) == len(values) and (not counts or key in TITLES)


def _skipped(run: Recorded) -> list[float]:
    keys = ("skipped_steps", "left_out_steps")
    several = [values_of(run.records, key) for key in keys]
    return [sum(value for value in counts if math.isfinite(value)) for counts in zip(*several, strict=True)]


def _curves(runs: Sequence[Recorded], metric: str, over: str) -> list[Curve]:
    """The curves of ``metric``, of each run that has it. The smoothed one is of what is within the frame."""
    found: list[Curve] = []
    for number, run in enumerate(runs):
        of_run = _of(run, metric, over)
        if of_run is None:
            continue
        places, values = of_run
        several = len(runs) > 1
        name = run.name if several else TITLES.get(metric, metric)
        if len(values) >= (FEW if metric == LOSS else MANY) and not _is_smooth(metric):
            limits = Limits.of(values)
            inside = limits.inside(values) if limits else values
            found += [
                Curve(name, places, values, number, "raw", listed=not several),
                Curve(name if several else "smoothed", *smoothed(places, inside), number, "smooth"),
            ]
        else:
            is_few = len(values) < FEW or metric.startswith("eval_")
            kind = "dots" if is_few else "line"
            found.append(Curve(name, places, values, number, kind, has_best=metric == EVALUATION))
        if metric == LOSS and not several and (evaluated := _of(run, EVALUATION, over)):
            found.append(Curve("evaluation", *evaluated, 1, "dots", has_best=True))
    return found


def _is_smooth(metric: str) -> bool:
    """Whether ``metric`` is no noisy quantity of single steps."""
    return metric in ("learning_rate", "skipped") or metric.startswith("eval_")


def _of(run: Recorded, metric: str, over: str) -> tuple[list[float], list[float]] | None:
    """The places of ``metric`` on the axis ``over``, which rise, and its values; None where the run has none."""
    try:
        places, values = run.curve(LOSS if metric == "skipped" else metric, over)
    except UserError:
        return None
    values = _skipped(run) if metric == "skipped" else values
    if any(later < earlier for earlier, later in pairwise(places)):  # lines of a file that was damaged
        order = sorted(range(len(places)), key=places.__getitem__)
        places, values = [places[at] for at in order], [values[at] for at in order]
    return places, values


def _chart(metric: str, curves: Sequence[Curve], across: Scale, over: str) -> Html:
    drawn = [curve.values for curve in curves if curve.kind != "smooth"]
    limits = Limits.of(*drawn)
    title = TITLES.get(metric, metric)
    if limits is None:
        return element("figure", element("h3", title), element("p", "No value is a finite number."), class_="chart")
    low = min(0.0, limits.low) if metric in ("learning_rate", "skipped") else limits.low
    up = Scale(low, limits.high, limits.is_log and low > 0)
    plot = element("div", *_frame(across, up, curves), class_="plot", tabindex="0", **_scales(across, up))
    listed = [curve for curve in curves if curve.listed]
    legend = [_listed(curve, metric, over, is_only=len(curves) == 1) for curve in listed]
    beyond = [part for curve in curves if curve.kind != "smooth" for part in _beyond(curve, up)]
    return element(
        "figure",
        element("h3", title, element("small", " on a logarithmic scale") if up.is_log else ""),
        plot,
        element("p", X_AXES[over], class_="axis"),
        element("ul", *legend, class_="legend"),
        element("p", *beyond, class_="note") if beyond else "",
        element("output", class_="read"),
        class_="chart wider" if metric == LOSS else "chart",
    )


def _scales(across: Scale, up: Scale) -> dict[str, object]:
    """What ``page.js`` has to know of the axes."""
    numbers = (across.low, across.high, up.low, up.high, int(up.is_log))
    return {"role": "group", "data_axes": " ".join(f"{number:.9g}" for number in numbers)}


def _frame(across: Scale, up: Scale, curves: Sequence[Curve]) -> Iterator[Html]:
    for value in up.ticks():
        share = up.place(value) / GRID
        yield element("i", element("b", label(value)), class_="y", style=f"bottom:{share:.2%}")
    for value in across.ticks():
        share = across.place(value) / GRID
        yield element("i", element("b", label(value)), class_="x", style=f"left:{share:.2%}")
    stretched = {"viewBox": f"0 0 {GRID} {GRID}", "preserveAspectRatio": "none", "aria_hidden": "true"}
    lines = [path for curve in curves for path in _paths(curve, across, up)]
    marks = [mark for curve in curves if curve.kind != "smooth" for mark in _marks(curve, across, up)]
    yield element("svg", *lines, class_="lines", **stretched)
    if marks:
        yield element("svg", *marks, class_="marks", **stretched)


def _paths(curve: Curve, across: Scale, up: Scale) -> Iterator[Html]:
    """The line of ``curve``, and a dot at each point where these are marked, the least of evaluations larger."""
    style = f"c{curve.color % COLORS} s{curve.color // COLORS % 4}"
    points = [
        None if math.isnan(value) else (across.place(place), GRID - up.place(value))
        for place, value in thinned(curve.places, [_finite_or_nan(value) for value in curve.values])
    ]
    if curve.kind != "dots" or len(points) > 1:
        name = curve.name if curve.listed else None
        yield element("path", d=_line(points), class_=f"{curve.kind} {style}", data_name=name)
    if curve.kind == "dots":
        at = "".join(f"M{x} {y}h0" for x, y in filter(None, points))
        yield element("path", d=at, class_=f"dot {style}", data_name=None if len(points) > 1 else curve.name)
        if best := _best(curve):
            x, y = across.place(best[0]), GRID - up.place(best[1])
            yield element("path", d=f"M{x} {y}h0", class_=f"ring {style}")
            yield element("path", d=f"M{x} {y}h0", class_=f"best {style}")


def _line(points: Sequence[tuple[int, int] | None]) -> str:
    written = []
    begins = True
    for point in points:
        if point is not None:
            written.append(f"{'M' if begins else 'L'}{point[0]} {point[1]}")
        begins = point is None
    return "".join(written)


def thinned(places: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """The points of a curve that can be told apart: of each of ``BUCKETS`` parts the lowest and the highest.

    A part without a number is a gap, NaN.
    """
    points = list(zip(places, values, strict=True))
    if len(points) <= 2 * BUCKETS:
        return points
    kept = []
    bounds = [len(points) * number // BUCKETS for number in range(BUCKETS + 1)]
    for begin, end in pairwise(bounds):
        known = [at for at in range(begin, end) if not math.isnan(values[at])]
        if known:
            ends = {min(known, key=values.__getitem__), max(known, key=values.__getitem__)}
            kept += [points[at] for at in sorted(ends)]
        else:
            kept.append((places[begin], math.nan))
    return kept


def _finite_or_nan(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _best(curve: Curve) -> tuple[float, float] | None:
    """Where the least value of an evaluation is."""
    if not curve.has_best:
        return None
    known = [(value, place) for place, value in zip(curve.places, curve.values, strict=True) if math.isfinite(value)]
    value, place = min(known, default=(math.nan, math.nan))
    return None if math.isnan(value) else (place, value)


def _marks(curve: Curve, across: Scale, up: Scale) -> Iterator[Html]:
    """Marks at the edge of the frame, of values beyond it and of those that are no numbers."""
    for is_there, edge in ((_is_above, 0), (_is_below, GRID)):
        some = [place for place, value in zip(curve.places, curve.values, strict=True) if is_there(value, up)]
        at = sorted({across.place(place) // 200 * 200 for place in some})
        if at:
            yield element("path", d="".join(f"M{x} {edge}h0" for x in at), class_=f"c{curve.color % COLORS}")


def _is_above(value: float, up: Scale) -> bool:
    return not value <= up.high


def _is_below(value: float, up: Scale) -> bool:
    return value < up.low


def _beyond(curve: Curve, up: Scale) -> Iterator[str]:
    kinds: tuple[tuple[str, Callable[[float], bool]], ...] = (
        ("above the frame", lambda value: value > up.high and math.isfinite(value)),
        ("below the frame", lambda value: value < up.low and math.isfinite(value)),
        ("not finite", lambda value: not math.isfinite(value)),
    )
    for what, holds in kinds:
        some = [value for value in curve.values if holds(value)]
        if some:
            numbers = [value for value in some if math.isfinite(value)]
            furthest = f", up to {label(max(numbers, key=abs))}" if numbers else ""
            records = "record" if len(some) == 1 else "records"
            yield f"{curve.name}: {len(some):,} {records} {what}{furthest}; marked at the edge. "


def _listed(curve: Curve, metric: str, over: str, *, is_only: bool) -> Html:
    """``curve`` in the legend; ``is_only``: the title of its chart names it already."""
    said = ""
    if best := _best(curve):
        said = f"best {best[1]:.4g}" + (f" at step {best[0]:,.0f}" if over == "steps" else "")
    elif metric != LOSS and curve.name != "smoothed":
        known = [value for value in curve.values if math.isfinite(value)]
        said = f"last {label(known[-1])}" if known else ""
    if is_only:
        return element("li", said)
    said = f", {said}" if said else ""
    style = f"key {curve.kind} c{curve.color % COLORS} s{curve.color // COLORS % 4}"
    return element("li", element("span", class_=style), curve.name, said)
