"""tensorboard/: read back as TensorBoard does."""

from __future__ import annotations

import time
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from panda.hooks.tensorboard import TensorBoard
from panda.registry import NoOptions
from panda.registry.contexts import PluginContext


def started(run: Any) -> TensorBoard:
    plugin = TensorBoard(NoOptions(), PluginContext())
    plugin.panda_run_start(run)
    return plugin


def read(run: Any) -> EventAccumulator:
    events = EventAccumulator(str(run.directory / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    return events


@pytest.mark.parametrize("end", ["panda_run_end", "panda_exception"])
def test_every_number_of_a_record_is_a_scalar_at_its_step(make_run: Any, record: Any, end: str) -> None:
    run = make_run()
    plugin = started(run)
    for step in (2, 4, 6):
        plugin.panda_log(run, record(step))
    getattr(plugin, end)()
    events = read(run)
    assert set(events.Tags()["scalars"]) == {f"train/{key}" for key in record(1) if key != "step"}
    for key in ("loss", "learning_rate", "tokens"):
        scalars = [(event.step, event.value) for event in events.Scalars(f"train/{key}")]
        assert scalars == [(step, pytest.approx(record(step)[key], rel=1e-6)) for step in (2, 4, 6)]


def test_the_configuration_is_there_to_read(make_run: Any) -> None:
    run = make_run()
    started(run).panda_run_end()
    [text] = read(run).Tensors("config/text_summary")
    assert b"seed: 42" in text.tensor_proto.string_val[0]


def test_a_resumed_run_hides_the_steps_that_it_takes_again(make_run: Any, record: Any) -> None:
    run = make_run()
    plugin = started(run)
    for step in range(1, 8):
        plugin.panda_log(run, record(step, loss=1.0))
    plugin.panda_exception()
    time.sleep(1.1)  # files are read in the order of their names, which have the second and, as text, a count
    run = make_run(step=4)
    plugin = started(run)
    for step in range(5, 11):
        plugin.panda_log(run, record(step, loss=2.0))
    plugin.panda_run_end()
    scalars = [(event.step, event.value) for event in read(run).Scalars("train/loss")]
    assert scalars == [(step, 1.0 if step <= 4 else 2.0) for step in range(1, 11)]


def test_only_rank_0_writes(make_run: Any) -> None:
    run = make_run(rank=1)
    started(run).panda_run_end()
    assert [path.name for path in run.directory.iterdir()] == ["config.yaml"]


def test_ending_twice_is_no_error(make_run: Any) -> None:
    plugin = started(make_run())
    plugin.panda_run_end()
    plugin.panda_exception()


def test_what_the_optimizer_tells_of_each_parameter_is_a_histogram(make_run: Any, record: Any) -> None:
    run = make_run()
    plugin = started(run)
    for step in (1, 2):
        run.observations = {"trust_ratio": {"a": 1.0, "b": 3.0 * step}}
        plugin.panda_log(run, record(step))
    plugin.panda_run_end()
    found = [(event.step, event.histogram_value) for event in read(run).Histograms("train/trust_ratio")]
    assert [(step, value.num, value.sum, value.max) for step, value in found] == [(1, 2, 4, 3), (2, 2, 7, 6)]


def test_evaluations_are_scalars_of_their_own(make_run: Any, evaluation: Any) -> None:
    run = make_run()
    plugin = started(run)
    plugin.panda_evaluation(run, evaluation(4, loss=2.5))
    plugin.panda_run_end()
    events = read(run)
    assert set(events.Tags()["scalars"]) == {
        f"eval/{key}" for key in ("loss", "tokens", "supervised_tokens", "seconds")
    }
    assert [(event.step, event.value) for event in events.Scalars("eval/loss")] == [(4, 2.5)]
