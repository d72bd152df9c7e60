"""What a run that was killed between its last evaluation and its end records when it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributions import IMPORTS
from launching import metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.runner import train

PLUGINS = """
import importlib.machinery
import json
import sys
from panda.hooks.trackers import Tracker

sys.modules.setdefault("sent", type(sys)("sent")).__spec__ = importlib.machinery.ModuleSpec("sent", None)

@register_plugin("sent")
class Sent(Tracker):
    name = package = "sent"
    def open(self, run, configuration, earlier):
        self.opened = (run.directory / "sent.jsonl").open("a")
        return "a run"
    def send(self, opened, values, step): opened.write(json.dumps({"step": step, **values}) + "\\n")
    def close(self, opened, *, failed): opened.close()

@register_plugin("counting")
class Counting:
    heard = 0
    def __init__(self, options, context): pass
    @hookimpl
    def panda_evaluation(self, run):
        self.heard += 1
        (run.directory / "heard").write_text(str(self.heard))
"""
RUN: tuple[object, ...] = (
    *("--arch", "llama-tiny", "--num_layers", 1, "--hidden_size", 16, "--intermediate_size", 24, "--num_heads", 2),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 32, "--num_workers", 0),
    *("--gradient_accumulation_steps", 1, "--max_samples", 40, "--prompts", "a"),
    *("--max_steps", 4, "--eval_steps", 2, "-p", "no:plot"),
    *("--plugins", "./both.py:sent", "./both.py:counting"),
)


class KilledError(Exception):
    """In place of a process that is killed."""


def evaluated(run: Path) -> tuple[list[int], list[int], list[int]]:
    """The steps of evaluations in metrics.jsonl, in TensorBoard, and at a tracker."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    sent = map(json.loads, (run / "sent.jsonl").read_text().splitlines())
    return (
        [each["step"] for each in metrics(run) if "eval_loss" in each],
        [each.step for each in events.Scalars("eval/loss")],
        [each["step"] for each in sent if "eval_loss" in each],
    )


def test_an_evaluation_that_is_made_once_more_is_recorded_once(
    processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "both.py").write_text(IMPORTS + PLUGINS)
    for name in ("held", "other"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"input": "1 2 3", "target": name}] * 4))

    def ended(run: Any) -> None:
        raise KilledError

    def start(*flags: object, held_out: str = "held.json", output_dir: str = "run") -> None:
        flags = (*RUN, *flags, "--eval_data_dir", held_out, "--output_dir", output_dir)
        train(configure(parse_arguments([*map(str, flags)])))

    with monkeypatch.context() as patch:
        patch.setattr("panda.runner.finish", ended)
        with pytest.raises(KilledError):
            start()
        with pytest.raises(KilledError):
            start("--resume", "auto")
    assert evaluated(tmp_path / "run") == ([2, 4],) * 3
    assert (tmp_path / "run/heard").read_text() == "1", "a plugin that acts hears of it at each start"
    start("--resume", "auto", held_out="other.json")
    assert evaluated(tmp_path / "run") == ([2, 4, 4],) * 3, "of other data"
    start("--resume", "run/checkpoints/step-00000004", output_dir="run-on")
    assert evaluated(tmp_path / "run-on") == ([4],) * 3, "of another run"
