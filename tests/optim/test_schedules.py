"""Each schedule against its formula, written out here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from panda.optim import schedules
from panda.optim.schedules import CosineOptions
from panda.optim.schedules import PolyOptions
from panda.optim.schedules import WarmupOptions
from panda.optim.schedules import WSDOptions
from panda.registry import UserError
from panda.registry.contexts import LRSchedulerContext

PEAK = 2e-3

# the factor of the step after s completed ones, after a warm-up of w, in a run of t.
FORMULAE: dict[str, Callable[[int, int, int], float]] = {
    "warmup": lambda s, w, t: 1.0,
    "constant": lambda s, w, t: 1.0,
    "linear": lambda s, w, t: max(0.0, (t - s) / max(1, t - w)),
    "cosine": lambda s, w, t: 0.5 * (1 + math.cos(math.pi * min(1, (s - w) / max(1, t - w)))),
    "wsd": lambda s, w, t: (
        1.0
        if s <= max(w, t - round(t / 5))
        else 1 - math.sqrt((s - max(w, t - round(t / 5))) / (t - max(w, t - round(t / 5))))
    ),
    "poly": lambda s, w, t: ((PEAK - 1e-7) * (1 - min(1, (s - w) / max(1, t - w))) + 1e-7) / PEAK,
}
NAMES = sorted(FORMULAE)


def build(name: str, total: int, **options: Any) -> Callable[[int], float]:
    kind = {"poly": PolyOptions, "cosine": CosineOptions, "wsd": WSDOptions}.get(name, WarmupOptions)
    schedule: Callable[[int], float] = getattr(schedules, name)(kind(**options), LRSchedulerContext(total, PEAK))
    return schedule


@pytest.mark.parametrize("name", NAMES)
@given(total=st.integers(1, 200), warm=st.integers(0, 250), s=st.integers(0, 199))
def test_a_schedule_is_its_formula(name: str, total: int, warm: int, s: int) -> None:
    s %= total
    expected = (s + 1) / warm if s < warm else FORMULAE[name](s, warm, total)
    assert build(name, total, warmup_steps=warm)(s) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", NAMES)
@given(total=st.integers(1, 200), warm=st.integers(0, 250))
def test_every_step_of_a_run_has_a_rate_above_zero_and_none_above_the_peak(name: str, total: int, warm: int) -> None:
    schedule = build(name, total, warmup_steps=warm)
    assert all(0 < schedule(s) <= 1 for s in range(total))


@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_has_neither_rate_zero_nor_the_peak(name: str) -> None:
    assert build(name, 100, warmup_steps=4)(0) == 0.25
    assert build(name, 100, warmup_steps=2)(0) == 0.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warm", [0, 1])
def test_without_a_warm_up_the_first_step_has_the_peak(name: str, warm: int) -> None:
    assert build(name, 100, warmup_steps=warm)(0) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_warm_up_is_the_promised_fifty_steps_unless_told_otherwise(name: str) -> None:
    schedule = build(name, 1000)
    assert [schedule(s) for s in (0, 24, 49)] == [1 / 50, 25 / 50, 1]


@pytest.mark.parametrize("name", NAMES)
def test_the_peak_is_reached_when_the_warm_up_ends(name: str) -> None:
    schedule = build(name, 100, warmup_steps=10)
    assert schedule(8) < 1
    assert schedule(9) == schedule(10) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_up_longer_than_the_run_just_rises(name: str) -> None:
    schedule = build(name, 10, warmup_steps=40)
    assert [schedule(s) for s in range(10)] == [(s + 1) / 40 for s in range(10)]


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_up_as_long_as_the_run_ends_at_the_peak(name: str) -> None:
    schedule = build(name, 10, warmup_steps=10)
    assert [schedule(s) for s in range(10)] == [(s + 1) / 10 for s in range(10)]


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_up_proportion_wins_over_steps(name: str) -> None:
    proportion, steps = build(name, 80, warmup_proportion=0.25, warmup_steps=3), build(name, 80, warmup_steps=20)
    assert [proportion(s) for s in range(90)] == [steps(s) for s in range(90)]


def test_a_warm_up_proportion_of_zero_leaves_the_steps_alone() -> None:
    assert build("linear", 80, warmup_proportion=0.0, warmup_steps=8)(0) == 1 / 8


@given(part=st.integers(1, 100), total=st.integers(1, 30).map(lambda hundreds: hundreds * 100))
def test_a_warm_up_proportion_that_is_whole_steps_is_those_steps(part: int, total: int) -> None:
    """0.29 * 100 is 28.999999999999996 to a computer."""
    warm = part * total // 100
    assert build("warmup", total, warmup_proportion=part / 100)(0) == 1 / warm


def test_linear_cosine_and_wsd_end_at_zero_where_the_run_ends_and_stay_there() -> None:
    for name in ("linear", "cosine", "wsd"):
        schedule = build(name, 100, warmup_steps=10)
        assert [schedule(s) for s in (100, 101, 1000)] == pytest.approx([0, 0, 0], abs=1e-15)
        falling = [schedule(s) for s in range(10, 101)]
        assert falling == sorted(falling, reverse=True)


def test_poly_ends_at_lr_end_and_stays_there() -> None:
    schedule = build("poly", 100, warmup_steps=10, lr_end=3e-4, power=2.0)
    assert [PEAK * schedule(s) for s in (100, 101, 1000)] == pytest.approx([3e-4] * 3, rel=1e-12)


def test_poly_follows_its_power() -> None:
    schedule = build("poly", 110, warmup_steps=10, lr_end=2e-4, power=3.0)
    assert PEAK * schedule(60) == pytest.approx((PEAK - 2e-4) * 0.5**3 + 2e-4, rel=1e-12)


def test_poly_may_end_at_zero() -> None:
    assert build("poly", 100, warmup_steps=10, lr_end=0.0)(100) == 0


@pytest.mark.parametrize("end", [PEAK, PEAK * 2])
def test_poly_refuses_an_end_that_is_not_below_the_peak(end: float) -> None:
    with pytest.raises(UserError, match=rf"lr_end.* {end} .*less than learning_rate.* {PEAK}"):
        build("poly", 100, lr_end=end)


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_a_floor_is_where_the_run_ends_and_it_stays_there(name: str) -> None:
    schedule = build(name, 100, warmup_steps=10, min_lr_ratio=0.1)
    assert [schedule(s) for s in (100, 101, 1000)] == pytest.approx([0.1] * 3, rel=1e-12)
    assert schedule(10) == 1
    falling = [schedule(s) for s in range(10, 101)]
    assert falling == sorted(falling, reverse=True)


def test_cosine_with_a_floor_is_in_the_middle_between_them() -> None:
    assert build("cosine", 110, warmup_steps=10, min_lr_ratio=0.2)(60) == pytest.approx(0.6)


def test_wsd_is_flat_until_its_decay_and_falls_by_its_shape() -> None:
    by_shape = {
        shape: build("wsd", 200, warmup_steps=10, decay_proportion=0.25, decay_shape=shape, min_lr_ratio=0.5)
        for shape in ("sqrt", "linear")
    }
    for schedule in by_shape.values():
        assert {schedule(s) for s in range(9, 151)} == {1.0}
        assert schedule(151) < 1
    assert by_shape["linear"](175) == pytest.approx(0.75)
    assert by_shape["sqrt"](175) == pytest.approx(1 - 0.5 * math.sqrt(0.5))


def test_wsd_of_a_longer_run_is_the_same_before_the_decay() -> None:
    short, long = build("wsd", 100, warmup_steps=10), build("wsd", 1000, warmup_steps=10)
    assert [short(s) for s in range(81)] == [long(s) for s in range(81)]


def test_wsd_with_a_proportion_is_the_same_in_a_longer_run_from_the_end_of_the_longer_warm_up() -> None:
    short, long = (build("wsd", total, warmup_proportion=0.1) for total in (100, 200))
    assert [completed for completed in range(81) if short(completed) != long(completed)] == list(range(19))


def test_wsd_decays_behind_its_warm_up() -> None:
    schedule = build("wsd", 10, warmup_steps=6, decay_proportion=1.0, decay_shape="linear")
    assert [schedule(s) for s in range(11)] == pytest.approx([*[s / 6 for s in range(1, 7)], 1, 0.75, 0.5, 0.25, 0])
