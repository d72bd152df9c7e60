"""Checkpoints that another process reads: they stay where they are until it has."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from launching import losses

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.checkpoints.folders import damage
from panda.engine.checkpoints.in_use import being_read
from panda.engine.checkpoints.in_use import remove_unless_read
from panda.engine.processes import Processes
from panda.registry import UserError
from panda.run import beginning
from panda.run.loop import Loop
from panda.runner import train

RUN = (
    *("--arch", "llama-tiny", "--num_layers", "1", "--hidden_size", "16", "--intermediate_size", "24"),
    *("--num_heads", "2", "--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", "32"),
    *("--gradient_accumulation_steps", "1", "--num_workers", "0", "--save_steps", "1"),
    *("-p", "no:plot", "-p", "no:tensorboard", "--prompts", "a", "--learning_rate", "1e-3"),
)


def run(*argv: str, steps: int = 3) -> None:
    assert train(configure(parse_arguments([*RUN, "--max_steps", str(steps), *argv]))) is not None


def test_a_run_that_begins_from_the_checkpoint_of_another_holds_it_until_it_has_read_it(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run("--output_dir", str(first))
    checkpoint = first / "checkpoints/step-00000003"
    is_removed: list[bool] = []
    load, step = beginning.load_checkpoint, Loop.step

    def loading(*args: Any, **named: Any) -> bool:
        is_removed.append(remove_unless_read(checkpoint))  # as the other run would do when it saves
        return load(*args, **named)

    def stepping(*args: Any) -> None:
        is_removed.append(remove_unless_read(checkpoint))
        step(*args)

    monkeypatch.setattr(beginning, "load_checkpoint", loading)
    monkeypatch.setattr("panda.runner.load_state", lambda run, path: is_removed.append(remove_unless_read(path)))
    monkeypatch.setattr(Loop, "step", stepping)
    run("--output_dir", str(second), "--resume", str(first), steps=4)
    assert is_removed == [False, False, True], "while it is loaded, while plugins load, and in the first step"
    assert len(losses(second)) == 1


def test_a_run_that_goes_back_waits_for_whoever_reads_a_later_checkpoint(
    processes: Processes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    run("--output_dir", str(directory))
    later = directory / "checkpoints/step-00000003"
    was_left: list[bool] = []

    def read() -> None:
        with being_read(later):
            reading.set()
            deadline = time.monotonic() + 20
            while "waiting: " not in capsys.readouterr().out and time.monotonic() < deadline:
                time.sleep(0.05)
            was_left.append(not [*later.parent.glob("abandoned-*3")])

    reading = threading.Event()
    reader = threading.Thread(target=read)
    reader.start()
    assert reading.wait(60)
    run("--output_dir", str(directory), "--resume", str(directory / "checkpoints/step-00000001"))
    reader.join()
    assert was_left == [True]
    names = sorted(path.name for path in later.parent.glob("*step-*"))
    assert names == [
        *("abandoned-1-step-00000002", "abandoned-1-step-00000003"),
        *("step-00000001", "step-00000002", "step-00000003"),
    ]


def test_a_forked_process_does_not_hold_what_is_read(processes: Processes, tmp_path: Path) -> None:
    """As those that prepare batches, which live longer than the reading."""
    run("--output_dir", str(tmp_path / "run"), steps=1)
    checkpoint = tmp_path / "run/checkpoints/step-00000001"
    with being_read(checkpoint):
        begun, begins = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(begins, b"!")
            time.sleep(60)
            os._exit(0)
    try:
        os.read(begun, 1)
        assert remove_unless_read(checkpoint)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_run_that_is_killed_before_its_first_save_goes_on_from_where_it_began(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began from the checkpoint of another run; from random weights it would be another one."""
    first, second, whole = tmp_path / "first", tmp_path / "second", tmp_path / "whole"
    run("--output_dir", str(first))
    run("--output_dir", str(whole), "--resume", str(first), steps=5)
    checkpoint = first / "checkpoints/step-00000003"

    for place in ("panda.runner.Loop.train", "panda.run.beginning.write_description"):
        with monkeypatch.context() as patch, pytest.raises(KeyError):
            patch.setattr(place, lambda *given: {}["killed"])
            run("--output_dir", str(second), "--resume", str(first), steps=5)
        with pytest.raises(
            UserError, match=rf"`panda-train --resume auto --output_dir {second}` begins the run again\.$"
        ):
            run("--output_dir", str(second), "--resume", str(second), steps=5)
        run("--output_dir", str(second), "--resume", "auto", steps=5)
        assert losses(second) == losses(whole) and len(losses(second)) == 2
        for damaged in second.glob("checkpoints/step-*/manifest.json"):
            damaged.write_text("[]")
        (second / "metrics.jsonl").unlink()
        described = json.loads((second / "provenance.json").read_text())
        (second / "provenance.json").write_text(json.dumps({key: described[key] for key in described if key != "end"}))
        run("--output_dir", str(second), "--resume", "auto", steps=5)
        assert losses(second) == losses(whole), "its own checkpoints are all damaged"
        assert len([*second.glob("checkpoints/damaged-1-*")]) == 2 and damage(checkpoint) is None
        shutil.rmtree(second)

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr("panda.runner.Loop.train", lambda *given: {}["killed"])
        run("--output_dir", str(second), "--resume", str(first), steps=5)
    shutil.rmtree(first)
    with pytest.raises(UserError, match=r"began from .*first/checkpoints/step-00000003, which is gone"):
        run("--output_dir", str(second), "--resume", "auto", steps=5)
