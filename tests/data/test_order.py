"""Which sample comes when: a promise of arithmetic, so it is tested as one."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from panda.data.order import BatchPlan
from panda.data.order import SampleOrder
from panda.data.order import Source
from panda.data.order import permute

keys = st.integers(0, 2**64 - 1)


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    return BatchPlan(
        samples=draw(st.integers(1, 60)),
        micro_batch=draw(st.integers(1, 5)),
        accumulation=draw(st.integers(1, 4)),
        ranks=draw(st.integers(1, 4)),
        epochs=draw(st.floats(0.01, 4)),
        max_steps=draw(st.sampled_from([-1, 1, 2, 5])),
    )


def permuted(size: int, key: int) -> list[int]:
    return permute(np.arange(size), size, key).tolist()


def ordered(positions: range, *sizes: int, seed: int) -> list[int]:
    """The samples at ``positions``, of sources of these sizes or of these (samples, per_epoch)."""
    sources = [Source(*size) if isinstance(size, tuple) else Source(size, size) for size in sizes]
    return SampleOrder(sources, seed).samples(positions).tolist()


def step_positions(plan: BatchPlan, step: int) -> list[int]:
    return list(plan.positions(step))


def run_positions(plan: BatchPlan) -> list[int]:
    return [p for step in range(plan.start_step + 1, plan.total_steps + 1) for p in step_positions(plan, step)]


@given(st.integers(1, 3000), keys)
def test_permute_is_a_permutation_for_any_size_and_key(size: int, key: int) -> None:
    assert sorted(permuted(size, key)) == list(range(size))


@given(st.integers(1, 2**48), keys, st.data())
def test_permute_stays_inside_sets_too_large_to_list(size: int, key: int, data: st.DataObject) -> None:
    indices = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=20))
    images = set(permute(np.array(sorted(indices)), size, key).tolist())
    assert len(images) == len(indices)
    assert all(0 <= image < size for image in images)


@given(st.integers(30, 3000), keys, keys)
def test_different_keys_give_different_orders(size: int, key: int, other: int) -> None:
    if key != other:
        assert permuted(size, key) != permuted(size, other)


def test_different_epochs_and_seeds_give_different_orders() -> None:
    samples = 50
    orders = {
        tuple(ordered(range(epoch * samples, (epoch + 1) * samples), samples, seed=seed))
        for seed in range(20)
        for epoch in range(20)
    }
    assert len(orders) == 400


def test_the_order_looks_random() -> None:
    """Each sample comes at each place about equally often, and neighbours are no closer than chance."""
    size, epochs = 12, 6000
    counts = [[0] * size for _ in range(size)]
    follows = 0
    for epoch in range(epochs):
        order = ordered(range(epoch * size, (epoch + 1) * size), size, seed=3)
        for place, sample in enumerate(order):
            counts[place][sample] += 1
        follows += sum(b == a + 1 for a, b in pairwise(order))
    expected = epochs / size
    chi_squared = sum((count - expected) ** 2 / expected for row in counts for count in row)
    freedom = (size - 1) ** 2
    assert abs(chi_squared - freedom) < 5 * math.sqrt(2 * freedom)
    chance = (size - 1) / size  # of a place's successor being the next sample, over a whole order
    assert abs(follows / epochs - chance) < 0.1


def test_the_order_of_a_seed_never_changes() -> None:
    """Resuming a run of an older panda depends on it."""
    assert ordered(range(20), 10, seed=42) == GOLDEN_ORDER


GOLDEN_ORDER = [3, 2, 1, 7, 5, 4, 0, 6, 9, 8, 6, 2, 3, 9, 5, 7, 1, 8, 4, 0]


@given(st.integers(1, 200), st.integers(0, 5), st.integers(0, 2**32))
def test_each_epoch_visits_every_sample_once(samples: int, epoch: int, seed: int) -> None:
    visited = ordered(range(epoch * samples, (epoch + 1) * samples), samples, seed=seed)
    assert sorted(visited) == list(range(samples))


@given(st.integers(1, 200), st.integers(0, 500), st.integers(0, 60), st.integers(0, 2**32))
def test_any_stretch_of_positions_has_the_samples_of_each_alone(size: int, start: int, count: int, seed: int) -> None:
    stretch = ordered(range(start, start + count), size, seed=seed)
    assert stretch == [ordered(range(p, p + 1), size, seed=seed)[0] for p in range(start, start + count)]


mixtures = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 70)), min_size=1, max_size=3)


@given(mixtures, st.integers(0, 2**32), st.integers(2, 5))
def test_a_mixed_epoch_has_so_many_of_each_and_none_again_before_all(
    mixture: list[tuple[int, int]], seed: int, epochs: int
) -> None:
    length = sum(per_epoch for _, per_epoch in mixture)
    seen: list[list[int]] = [[] for _ in mixture]
    for epoch in range(epochs):
        drawn = ordered(range(epoch * length, (epoch + 1) * length), *mixture, seed=seed)
        first = 0
        for number, (samples, per_epoch) in enumerate(mixture):
            mine = [sample - first for sample in drawn if first <= sample < first + samples]
            assert len(mine) == per_epoch
            seen[number] += mine
            first += samples
    for visits, (samples, _) in zip(seen, mixture, strict=True):
        counts = [visits.count(sample) for sample in range(samples)]
        assert max(counts) - min(counts) <= 1


def test_sources_come_shuffled_together() -> None:
    drawn = ordered(range(1000), 500, 500, seed=1)
    switches = sum((a < 500) != (b < 500) for a, b in pairwise(drawn))
    assert 400 < switches < 600


def test_which_part_of_a_source_comes_first_depends_on_the_seed() -> None:
    chosen = {
        tuple(sorted(s for s in ordered(range(15), (100, 5), (10, 10), seed=seed) if s < 100)) for seed in range(9)
    }
    assert len(chosen) == 9


def test_sources_of_a_mix_come_in_orders_of_their_own() -> None:
    """Two that are alike in number give an epoch other parts of themselves."""
    for seed in range(9):
        for epoch in range(2):
            drawn = ordered(range(epoch * 80, (epoch + 1) * 80), (100, 40), (100, 40), seed=seed)
            first, second = ({s % 100 for s in drawn if s // 100 == source} for source in (0, 1))
            assert len(first) == len(second) == 40 and first != second


@given(plans())
def test_steps_cover_every_position_once_and_in_order(plan: BatchPlan) -> None:
    assert run_positions(plan) == list(range(plan.end_position))


@given(plans(), st.integers(1, 40))
def test_max_steps_is_exact_and_every_step_is_full(plan: BatchPlan, steps: int) -> None:
    plan = replace(plan, max_steps=steps)
    assert plan.total_steps == steps
    assert all(len(step_positions(plan, step)) == plan.step_samples for step in range(1, steps + 1))


@given(st.integers(1, 500), st.floats(0.01, 5), st.integers(1, 50))
def test_fractional_epochs_end_at_the_nearest_sample(samples: int, epochs: float, micro_batch: int) -> None:
    plan = BatchPlan(samples=samples, micro_batch=micro_batch, accumulation=1, ranks=1, epochs=epochs)
    length = len(run_positions(plan))
    assert length == 1 or abs(length - epochs * samples) <= 0.5
    assert plan.total_steps == math.ceil(length / micro_batch)


def test_half_an_epoch_of_a_hundred_samples_is_fifty() -> None:
    plan = BatchPlan(samples=100, micro_batch=8, accumulation=1, ranks=1, epochs=0.5)
    assert run_positions(plan) == list(range(50))


@given(plans(), st.data())
def test_a_resumed_plan_goes_on_with_the_same_steps(plan: BatchPlan, data: st.DataObject) -> None:
    done = data.draw(st.integers(0, plan.total_steps))
    resumed = replace(plan, start_step=done, start_position=plan.step_end(done))
    assert resumed.total_steps == plan.total_steps
    assert resumed.end_position == plan.end_position
    for step in range(done + 1, plan.total_steps + 1):
        assert step_positions(resumed, step) == step_positions(plan, step)
        assert resumed.step_end(step) == plan.step_end(step)


@given(plans(), st.data())
def test_a_run_resumed_twice_is_the_same_as_one_resumed_once(plan: BatchPlan, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, plan.total_steps))
    second = data.draw(st.integers(first, plan.total_steps))
    once = replace(plan, start_step=first, start_position=plan.step_end(first))
    twice = replace(once, start_step=second, start_position=once.step_end(second))
    assert run_positions(twice) == list(range(plan.step_end(second), plan.end_position))
    assert twice.total_steps == plan.total_steps


@given(plans(), st.data(), st.integers(1, 4))
def test_a_run_resumed_on_other_ranks_goes_on_where_it_was(plan: BatchPlan, data: st.DataObject, ranks: int) -> None:
    plan = replace(plan, max_steps=-1)
    done = data.draw(st.integers(0, plan.total_steps))
    resumed = replace(plan, ranks=ranks, start_step=done, start_position=plan.step_end(done))
    assert run_positions(resumed) == list(range(plan.step_end(done), plan.end_position))


def test_a_run_that_is_over_has_no_steps_left() -> None:
    plan = BatchPlan(samples=10, micro_batch=4, accumulation=1, ranks=1, epochs=1, start_step=3, start_position=10)
    assert plan.total_steps == 3
    assert run_positions(plan) == []


def test_a_finished_run_can_be_made_longer() -> None:
    plan = BatchPlan(samples=10, micro_batch=4, accumulation=1, ranks=1, epochs=2, start_step=3, start_position=10)
    assert plan.total_steps == 6
    assert run_positions(plan) == list(range(10, 20))


@given(plans(), st.data(), st.integers(1, 4), st.integers(1, 12))
def test_max_steps_is_exact_also_in_a_run_resumed_on_other_ranks(
    plan: BatchPlan, data: st.DataObject, ranks: int, steps: int
) -> None:
    plan = replace(plan, max_steps=steps)
    done = data.draw(st.integers(0, steps))
    resumed = replace(plan, ranks=ranks, start_step=done, start_position=plan.step_end(done))
    assert resumed.total_steps == steps
    assert len(run_positions(resumed)) == (steps - done) * resumed.step_samples
