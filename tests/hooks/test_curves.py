"""Curves of runs: the scale of their axes, what is smoothed, and what they are drawn over."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from panda.hooks.curves import POINTS
from panda.hooks.curves import Limits
from panda.hooks.curves import Recorded
from panda.hooks.curves import draw_run
from panda.hooks.curves import draw_runs
from panda.hooks.curves import smoothed
from panda.registry import UserError


def noisy(length: int, curve: Any) -> list[float]:
    drawn = random.Random(3)
    return [curve(step) + drawn.gauss(0, 0.002) for step in range(length)]


def limits(*curves: list[float]) -> Limits:
    found = Limits.of(*curves)
    assert found is not None
    return found


# -- the scale of an axis


@pytest.mark.parametrize("length", [10, 50, 1000])
def test_a_fine_tune_that_hardly_moves_fills_the_frame(length: int) -> None:
    found = limits(noisy(length, lambda step: 7.61 - 0.02 * step / length))
    assert not found.is_log
    assert 7.57 < found.low < 7.595 < 7.605 < found.high < 7.63


@pytest.mark.parametrize("spike", [1e3, -5.0, math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 30, 99])
def test_a_spike_is_beyond_the_frame_and_its_neighbours_are_within(spike: float, at: int) -> None:
    losses = noisy(100, lambda step: 3 + 2 * math.exp(-step / 20))
    losses[at] = spike
    found = limits(losses)
    assert found.high < 8 and found.low > 1
    assert [number for number, value in enumerate(found.inside(losses)) if math.isnan(value)] == [at]


def test_the_first_steps_and_a_divergence_are_within_the_frame() -> None:
    losses = [*noisy(5000, lambda step: 2.5 + 8 * math.exp(-step / 30)), *[20.0] * 10]
    found = limits(losses)
    assert found.high > 20 and found.low < 2.5 and not any(map(math.isnan, found.inside(losses)))


def test_what_falls_by_decades_is_on_a_logarithmic_scale() -> None:
    assert limits([5 * math.exp(-step / 60) for step in range(400)]).is_log
    assert not limits([5 * math.exp(-step / 60) - 0.1 for step in range(400)]).is_log  # not positive
    assert not limits([2.0, 1.0, 0.5]).is_log


def test_evaluations_are_within_the_frame() -> None:
    assert limits([1.0, 0.9, 0.8], [1.5, 1.6, 1.7]).high > 1.7


@pytest.mark.parametrize("values", [[0.0], [3.0] * 9, [-1.0, -1.0]])
def test_a_constant_has_a_frame_around_it(values: list[float]) -> None:
    found = limits(values)
    assert found.low < values[0] < found.high


def test_nothing_finite_has_no_frame() -> None:
    assert Limits.of([math.nan], []) is None


# -- smoothing


@pytest.mark.parametrize("length", [20, 100, 3000])
def test_a_smoothed_line_is_that_line_up_to_its_ends(length: int) -> None:
    values = [5 - 0.01 * step for step in range(length)]
    places, curve = smoothed([*range(1, length + 1)], values)
    assert places[0] == 1 and places[-1] == length and len(places) <= POINTS
    assert curve == pytest.approx([5 - 0.01 * (place - 1) for place in places])


def test_noise_is_smoothed_and_gaps_stay() -> None:
    values = noisy(500, lambda step: 1.0)
    values[100:110] = [math.nan] * 10
    places, curve = smoothed([*range(500)], values)
    assert {place for place, value in zip(places, curve, strict=True) if math.isnan(value)} == {*range(100, 110)} & {
        *places
    }
    assert max(abs(value - 1) for value in curve if math.isfinite(value)) < 0.002


# -- pictures


def test_a_picture_says_the_best_evaluation_what_is_beyond_and_which_steps_were_skipped(
    tmp_path: Path, record: Any, evaluation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: saved.append(figure))
    records = [record(step, 30.0 if step == 50 else None, skipped_steps=int(step > 60)) for step in range(1, 101)]
    evaluations = [evaluation(40, 1.5), evaluation(80, 1.25), evaluation(100, 1.75)]
    draw_run(Recorded("mine", records, evaluations), tmp_path / "loss.png", unit="pairs")
    loss, rate, norm, skipped = saved[0].axes
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [
        *("loss", "smoothed", "above, or not finite: 1 record", "evaluation", "best: 1.25 at step 80"),
    ]
    assert loss.get_ylabel() == "loss per pair" and loss.get_ylim()[1] < 10
    assert [axes.get_title() for axes in (rate, norm, skipped)] == ["learning rate", "gradient norm", "skipped steps"]
    assert skipped.lines[0].get_ydata()[-1] == 1
    draw_run(Recorded("mine", [record(step) for step in range(1, 30)]), tmp_path / "loss.png")
    assert len(saved[1].axes) == 3


@pytest.mark.parametrize(("over", "last"), [("steps", 20), ("tokens", 2000), ("hours", 20 * 0.25 / 3600)])
def test_runs_are_drawn_beside_each_other(
    tmp_path: Path, record: Any, evaluation: Any, monkeypatch: pytest.MonkeyPatch, over: str, last: float
) -> None:
    runs = [Recorded(name, [record(step) for step in range(1, 21)], [evaluation(10), evaluation(20)]) for name in "ab"]
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: saved.append(figure))
    draw_runs(runs, tmp_path / "runs.svg", metric="eval_loss", over=over)
    axes = saved[0].axes[0]
    for line in axes.lines:
        assert line.get_xdata() == pytest.approx([last / 2, last])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_a_metric_that_a_run_has_not_recorded_is_refused_with_those_that_it_has(tmp_path: Path, record: Any) -> None:
    scored = Recorded("a", [record(1)], [{"step": 1, "eval_loss": 1.0, "eval_rouge1": 0.5, "ends": "text"}])
    for metric, near in (
        ("accuracy", ""),
        ("grad_nrm", " Did you mean 'grad_norm'?"),
        ("rouge1", " Did you mean 'eval_rouge1'?"),
    ):
        said = (
            rf"a has no '{metric}' on record\.{re.escape(near)} It has data_wait, eval_loss, eval_rouge1, grad_norm, "
        )
        with pytest.raises(UserError, match=said) as refused:
            draw_runs([scored], tmp_path / "runs.png", metric=metric, over="steps")
        assert "ends" not in str(refused.value)
