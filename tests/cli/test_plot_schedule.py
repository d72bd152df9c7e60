from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from panda.cli import plot
from panda.cli.plot import main

SMALL = """arch: llama-tiny
instruction_tuning_data_dir: panda:data/sample/instruct
max_seq_length: 128
per_gpu_train_batch_size: 32
gradient_accumulation_steps: 1
learning_rate: 2e-3
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(SMALL)
    return "run.yaml"


@pytest.mark.parametrize("name", ["warmup", "linear", "cosine", "constant", "poly", "wsd"])
def test_every_schedule_is_drawn(config: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", config, "--lr_scheduler", name, "--max_steps", "100", "--warmup_steps", "10"]) == 0
    assert Path("schedule.png").read_bytes().startswith(b"\x89PNG")
    said = "schedule.png: 100 steps, peak 0.002 at step 10, to which it rises; first 0.0002, last "
    assert capsys.readouterr().out.startswith(said)
    assert main(["schedule", config, "--lr_scheduler", name, "--max_steps", "100", "--warmup_steps", "0"]) == 0
    assert ", peak 0.002, without a warm-up; first 0.002" in capsys.readouterr().out


def test_what_is_drawn_is_what_the_run_does(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plot, "draw_schedule", lambda rates, path, title: drawn.append((rates, path, title)))
    flags = ["--lr_scheduler=wsd", "--max_steps=10", "--warmup_steps=2", "--decay_proportion=0.5"]
    assert main(["schedule", config, "--out", "a.png", *flags, "--decay_shape", "linear"]) == 0
    (rates, path, title), *_ = drawn
    assert rates == pytest.approx([1e-3, *[2e-3] * 5, 1.6e-3, 1.2e-3, 0.8e-3, 0.4e-3])
    assert path == Path("a.png") and title == "wsd: 10 steps"


def test_ranks_that_hold_a_copy_together_take_one_part_of_the_data(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for processes in (None, "1", "2"):  # of the second, a run would be refused
        monkeypatch.setenv("WORLD_SIZE", processes) if processes else monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert main(["schedule", config, "--tensor_parallel_size", "2"]) == 0
        assert "schedule.png: 169 steps, " in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["schedule", config, "--tensor_parallel_size", "2"]) == 0
    assert capsys.readouterr().out.startswith("schedule.png: 85 steps, ")


def test_without_max_steps_the_data_decides(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", config, "--out=steps.png"]) == 0
    assert "steps.png: 169 steps, " in capsys.readouterr().out  # 5,400 rows by 32
    assert Path("steps.png").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["loss"], "loss: expected a run directory"),
        (["schedule"], "no configuration is given"),
        (["schedule", "run.yaml", "--out", "nowhere/a.png"], "nowhere/a.png"),
        (["schedule", "run.yaml", "--out", "a.jpg"], "a.jpg"),
        (["schedule", "run.yaml", "--min_lr_ratio", "0.1"], "min_lr_ratio"),
    ],
)
def test_mistakes_are_told(config: str, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert words in capsys.readouterr().err
    assert not Path("schedule.png").exists()


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "panda plot schedule" in capsys.readouterr().out.partition("examples:")[2]
