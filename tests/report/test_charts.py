"""Curves as HTML: which points are drawn, where, and what axes say."""

from __future__ import annotations

import math
import re

import pytest

from panda.hooks.curves import Recorded
from panda.report.charts import BUCKETS
from panda.report.charts import GRID
from panda.report.charts import Scale
from panda.report.charts import charts
from panda.report.charts import label
from panda.report.charts import thinned


def run(name: str, losses: list[float | None], **others: list[float]) -> Recorded:
    more = [dict(zip(others, values, strict=True)) for values in zip(*others.values(), strict=True)] or [{}] * len(
        losses
    )
    records = [
        {"step": step, "loss": loss} | each for step, (loss, each) in enumerate(zip(losses, more, strict=True), 1)
    ]
    return Recorded(name, records)


def test_a_long_curve_keeps_its_highest_and_its_lowest_points_and_its_gaps() -> None:
    values = [float(step % 50) for step in range(50_000)]
    values[12_345], values[33_333] = 1e6, -1e6
    values[20_000:20_200] = [math.nan] * 200
    found = thinned(range(50_000), values)
    assert len(found) <= 2 * BUCKETS
    assert {(12_345, 1e6), (33_333, -1e6)} <= {*found}
    assert [place for place, _ in found] == sorted(place for place, _ in found)
    assert any(math.isnan(value) and 20_000 <= place < 20_200 for place, value in found)
    assert thinned([1, 2], [3.0, math.nan])[0] == (1, 3.0)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (Scale(0, 100), [0, 20, 40, 60, 80, 100]),
        (Scale(7.594, 7.612), [7.595, 7.6, 7.605, 7.61]),
        (Scale(0.01, 20, is_log=True), [0.01, 0.1, 1, 10]),
        (Scale(1.5, 12, is_log=True), [2, 5, 10]),
        (Scale(1e-12, 1e12, is_log=True), [1e-12, 1e-7, 1e-2, 1e3, 1e8]),
        (Scale(3.0, 3.9, is_log=True), [3.0, 3.2, 3.4, 3.6, 3.8]),
    ],
)
def test_ticks_are_round_numbers_within_the_axis(scale: Scale, expected: list[float]) -> None:
    found = scale.ticks()
    assert found == pytest.approx(expected)


def test_a_value_stands_where_its_share_of_the_axis_is() -> None:
    assert [Scale(2, 4).place(value) for value in (2, 3, 4)] == [0, GRID // 2, GRID]
    assert Scale(1, 100, is_log=True).place(10) == GRID // 2
    assert Scale(1, 100, is_log=True).place(0) < -GRID and Scale(0, 1).place(1e300) > GRID


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (2e-4, "2e-4"), (0.25, "0.25"), (1234.5, "1234"), (25_000, "25k"), (1.5e6, "1.5M"), (3e20, "3e20")],
)
def test_labels_are_short(value: float, expected: str) -> None:
    assert label(value) == expected


def test_the_curve_of_a_run_goes_through_its_records() -> None:
    written = charts([run("one", [4.0, 2.0, 3.0])])
    [path] = re.findall(r'<path d="(M[^"h]*)" class="dots', written)
    points = [(int(x), int(y)) for x, y in re.findall(r"[ML](-?\d+) (-?\d+)", path)]
    assert [x for x, _ in points] == [33333, 66667, GRID]
    heights = [y for _, y in points]
    assert heights[0] < heights[2] < heights[1]  # y goes down
    assert heights[2] == pytest.approx((heights[0] + heights[1]) / 2, abs=2)


def test_what_is_not_finite_is_a_gap_that_is_marked() -> None:
    written = charts([run("one", [4.0, 3.0, None, 2.0, 1.0])])
    [path] = re.findall(r'<path d="(M[^"h]*)" class="dots', written)
    assert path.count("M") == 2
    assert 'class="marks"' in written and "loss: 1 record not finite; marked at the edge." in written


def test_several_runs_share_charts_and_what_only_counts_has_none() -> None:
    runs = [run("one", [3.0, 2.0], reward=[0.5, 0.25], seen=[1, 2]), run("two", [3.5, 2.5])]
    written = charts(runs)
    assert [re.sub("<[^>]*>", "", title) for title in re.findall("<h3>(.*?)</h3>", written)] == ["loss", "reward"]
    assert len(re.findall('data-name="one"', written)) == 2 and len(re.findall('data-name="two"', written)) == 1


def test_the_axis_below_is_tokens_or_hours_if_asked() -> None:
    records = [{"step": step, "loss": 1.0, "tokens": 100 * step**2, "step_seconds": 1800.0} for step in (1, 2, 3)]
    for over, last in (("tokens", 900), ("hours", 1.5)):
        written = charts([Recorded("one", records)], over)
        assert f'data-axes="0 {last} ' in written
    assert "No step is on record yet." in charts([Recorded("one", [])])
