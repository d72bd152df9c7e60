"""No garbage collection falls into an optimizer step, and garbage does not grow, whatever cycles a task makes."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.engine import Engine
from panda.registry import UserError
from panda.run import garbage
from panda.run.garbage import collect
from panda.run.garbage import collected_between_steps
from panda.runner import train

CYCLES = 3_000
"""Made in each step: several times as many as Python begins to collect at."""


class Knot:
    """An object that only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def begun() -> Iterator[list[int]]:
    """The generations of collections that began, with an item for each."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)


def test_what_a_step_leaves_is_freed_after_it_and_not_before(begun: list[int]) -> None:
    with collected_between_steps():
        begun.clear()
        knots = [weakref.ref(Knot()) for _ in range(CYCLES)]
        assert not begun and all(knot() is not None for knot in knots)
        collect(1)
        assert begun == [1] and not any(knot() for knot in knots)


def test_what_lives_longer_is_freed_where_more_time_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    with collected_between_steps():
        for step, whole in ((999, False), (1_000, True), (None, True)):
            held = Knot()
            knot = weakref.ref(held)
            collect(1)
            collect(2)  # it is old by now
            del held
            collect(step)
            assert (knot() is None) is whole
            collect()
            assert knot() is None


def test_a_long_step_collects_what_would_fill_the_memory(begun: list[int]) -> None:
    with collected_between_steps():
        begun.clear()
        knots = [weakref.ref(Knot()) for _ in range(garbage.MOST_NEW)]  # two objects each
        assert begun and any(knot() is None for knot in knots)


SET_APART = """
import gc
from panda.run.garbage import collected_between_steps

if FROZEN:
    gc.freeze()
before = gc.get_threshold(), gc.get_freeze_count()
made = [[] for _ in range(500)]
try:
    with collected_between_steps():
        print((gc.get_freeze_count() >= before[1] + 500) is not FROZEN, gc.get_threshold()[1:] == before[0][1:])
        1 / 0
except ZeroDivisionError:
    print((gc.get_threshold(), gc.get_freeze_count()) == before)
"""


@pytest.mark.parametrize("frozen", [False, True])
def test_afterwards_the_collector_is_as_before(frozen: bool) -> None:
    """In a process of its own, since the tests of a session set objects apart, too."""
    code = SET_APART.replace("FROZEN", str(frozen))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 3, done.stdout + done.stderr


def flags(*more: str) -> list[str]:
    shape = "--arch llama-tiny --num_layers 1 --hidden_size 16 --intermediate_size 16 --num_heads 1 --num_workers 0"
    short = "--gradient_accumulation_steps 2 --max_seq_length 64 --per_gpu_train_batch_size 2 --prompts a"
    data = "--instruction_tuning_data_dir rows.json --output_dir run"
    return [*f"{shape} {short} {data} --max_steps 5 --eval_fraction 0.5 --eval_steps 3".split(), *more]


@pytest.mark.parametrize("ends", ["well", "with an error"])
def test_no_collection_falls_into_a_step_of_a_run(
    processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[int], ends: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps([{"input": letter, "target": letter} for letter in "abcdefgh"]))
    knots: list[Any] = []
    left, in_steps, between = [], [], []
    step, evaluate = Engine.step, Engine.evaluate

    def tie() -> None:
        knots.extend(weakref.ref(Knot()) for _ in range(CYCLES))

    def stepping(*arguments: Any) -> Any:
        left.append(sum(knot() is not None for knot in knots))
        between.append(list(begun))
        begun.clear()
        tie()
        found = step(*arguments)
        in_steps.append(list(begun))
        if ends != "well" and len(left) == 5:
            raise UserError("that was enough")
        return found

    def evaluating(*arguments: Any) -> Any:
        tie()
        return evaluate(*arguments)

    monkeypatch.setattr(Engine, "step", stepping)
    monkeypatch.setattr(Engine, "evaluate", evaluating)
    thresholds = gc.get_threshold()
    if ends == "well":
        assert train(configure(parse_arguments(flags("--save_steps", "2")))) is not None
    else:
        with pytest.raises(UserError, match="that was enough"):
            train(configure(parse_arguments(flags("--save_steps", "2"))))
    assert in_steps == [[]] * 5
    assert between[1:] == [[1], [2, 1], [2, 1], [2, 1]], "a checkpoint, an evaluation and a checkpoint among them"
    assert left == [0] * 5, "none of the steps before is left"
    assert gc.get_threshold() == thresholds
