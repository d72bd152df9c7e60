"""Which sample comes when: a promise of arithmetic, so it is tested as one."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from panda.data.order import BatchPlan
from panda.data.order import permute
from panda.data.order import sample_at

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


def step_positions(plan: BatchPlan, step: int) -> list[int]:
    """The positions of one step in their order: micro batch by micro batch, rank by rank."""
    return [
        position
        for micro in range(plan.micro_batches(step))
        for rank in range(plan.ranks)
        for position in plan.positions(step, micro, rank)
    ]


def run_positions(plan: BatchPlan) -> list[int]:
    return [p for step in range(plan.start_step + 1, plan.total_steps + 1) for p in step_positions(plan, step)]


@given(st.integers(1, 3000), keys)
def test_permute_is_a_permutation_for_any_size_and_key(size: int, key: int) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


@given(st.integers(1, 2**48), keys, st.data())
def test_permute_stays_inside_sets_too_large_to_list(size: int, key: int, data: st.DataObject) -> None:
    indices = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=20))
    images = {permute(index, size, key) for index in indices}
    assert len(images) == len(indices)
    assert all(0 <= image < size for image in images)


@given(st.integers(30, 3000), keys, keys)
def test_different_keys_give_different_orders(size: int, key: int, other: int) -> None:
    if key != other:
        assert [permute(i, size, key) for i in range(size)] != [permute(i, size, other) for i in range(size)]


def test_different_epochs_and_seeds_give_different_orders() -> None:
    samples = 50
    orders = {
        tuple(sample_at(epoch * samples + index, samples, seed) for index in range(samples))
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
        order = [sample_at(epoch * size + index, size, seed=3) for index in range(size)]
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
    assert [sample_at(position, 10, seed=42) for position in range(20)] == GOLDEN_ORDER


GOLDEN_ORDER = [3, 2, 1, 7, 5, 4, 0, 6, 9, 8, 6, 2, 3, 9, 5, 7, 1, 8, 4, 0]


@given(st.integers(1, 200), st.integers(0, 5), st.integers(0, 2**32))
def test_each_epoch_visits_every_sample_once(samples: int, epoch: int, seed: int) -> None:
    visited = [sample_at(epoch * samples + index, samples, seed) for index in range(samples)]
    assert sorted(visited) == list(range(samples))


@given(plans())
def test_steps_micro_batches_and_ranks_cover_every_position_once_and_in_order(plan: BatchPlan) -> None:
    assert run_positions(plan) == list(range(plan.end_position))


@given(plans(), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_any_split_goes_through_the_same_positions(plan: BatchPlan, micro: int, accumulation: int, ranks: int) -> None:
    other = replace(plan, micro_batch=micro, accumulation=accumulation, ranks=ranks)
    mine, others = run_positions(plan), run_positions(other)
    shorter = min(len(mine), len(others))
    assert mine[:shorter] == others[:shorter]
    if plan.max_steps < 0 or plan.step_samples == other.step_samples:
        assert mine == others
        if plan.step_samples == other.step_samples:
            for step in range(1, plan.total_steps + 1):
                assert step_positions(plan, step) == step_positions(other, step)


@given(plans())
def test_every_rank_has_as_many_micro_batches_and_none_has_more_than_it_should(plan: BatchPlan) -> None:
    for step in range(1, plan.total_steps + 1):
        micro_batches = plan.micro_batches(step)
        assert 1 <= micro_batches <= plan.accumulation
        if step < plan.total_steps:
            assert micro_batches == plan.accumulation
        for micro in range(micro_batches):
            rows = [len(plan.positions(step, micro, rank)) for rank in range(plan.ranks)]
            assert max(rows) <= plan.micro_batch
            assert sum(rows) > 0


def test_the_last_step_of_an_epoch_run_is_short_and_equal_on_all_ranks() -> None:
    plan = BatchPlan(samples=13, micro_batch=2, accumulation=3, ranks=2, epochs=1)
    assert plan.total_steps == 2
    assert plan.micro_batches(2) == 1
    assert [list(plan.positions(2, 0, rank)) for rank in range(2)] == [[12], []]


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
        assert resumed.micro_batches(step) == plan.micro_batches(step)


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
