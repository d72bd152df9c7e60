"""Runs by name, as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from panda.registry.contexts import ModelContext
from safetensors.torch import load_file

from panda_example.gru import GruOptions
from panda_example.gru import build_gru

PANDA_TRAIN = str(Path(sys.executable).with_name("panda-train"))
PANDA = str(Path(sys.executable).with_name("panda"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
SAMPLE = ["--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", "64", "--num_workers", "0"]
NOTHING_DRAWN = ["-p", "no:plot", "-p", "no:tensorboard"]
"""A picture takes longer than the steps that it shows."""
GRU_AND_LION = ["--arch", "gru-tiny", "--optimizer", "lion", "--learning_rate", "1e-3", "--weight_decay", "0.1"]
CONFIG = Path(__file__).parents[1] / "configs" / "gru-tiny.yaml"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def train(directory: Path, *flags: str, launcher: list[str] | None = None) -> str:
    """What a run of three steps of 8 samples prints."""
    done = run(
        *(launcher or []), PANDA_TRAIN, *SAMPLE, *NOTHING_DRAWN, *flags, "--output_dir", str(directory),
        "--max_steps", "3", "--gradient_accumulation_steps", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Directory and output of a run in one process that uses everything in this package."""
    directory = tmp_path_factory.mktemp("runs") / "one"
    flags = ("--plugins", "report", "--per_gpu_train_batch_size", "8")
    return directory, train(directory, *GRU_AND_LION, *flags)


def test_run_records_where_its_components_came_from(finished: tuple[Path, str]) -> None:
    components = json.loads((finished[0] / "provenance.json").read_text())["components"]
    for label, module in {
        "model gru": "panda_example.gru",
        "arch gru-tiny": "panda_example.gru",
        "optimizer lion": "panda_example.lion",
        "plugin report": "panda_example.report",
    }.items():
        assert (components[label]["distribution"], components[label]["module"]) == ("panda-example", module)


def test_run_leaves_a_report(finished: tuple[Path, str]) -> None:
    text = (finished[0] / "report.md").read_text()
    assert "| run | complete |" in text
    assert "| steps | 1 to 3 |" in text
    assert f"| last loss | {losses(finished[0])[-1]:.4f} |" in text


def test_exported_weights_give_the_trained_models_logits(finished: tuple[Path, str]) -> None:
    export = finished[0] / "export"
    described: dict[str, Any] = json.loads((export / "config.json").read_text())
    assert described["panda_model"] == "panda-example:gru"
    weights = load_file(export / "model.safetensors")
    context = ModelContext(**described["context"])
    logits = []
    # Compared with the weights that DeepSpeed saved in training, which the export does not read.
    checkpoint = next((finished[0] / "checkpoints").rglob("*model_states.pt"))
    for state in (weights, torch.load(checkpoint, weights_only=False)["module"]):
        model = build_gru(GruOptions(**described["options"]), context)
        model.load_state_dict(state)
        with torch.no_grad():
            logits.append(model(torch.arange(20)[None]))
    assert torch.equal(*logits)


def test_two_ranks_give_the_losses_of_one(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Under ZeRO-3, which demands the most of a model."""
    flags = ("--per_gpu_train_batch_size", "4", "--zero_stage", "3")
    train(tmp_path / "two", *GRU_AND_LION, *flags, launcher=TORCHRUN)
    assert losses(tmp_path / "two") == pytest.approx(losses(finished[0]), rel=0, abs=1e-5)


def test_a_models_hook_is_active_only_if_the_model_is_chosen(finished: tuple[Path, str], tmp_path: Path) -> None:
    assert "gru: the state that is carried" in finished[1]
    flags = ("--arch", "llama-tiny", "--num_layers", "1", "--optimizer", "lion", "--per_gpu_train_batch_size", "2")
    assert "gru:" not in train(tmp_path / "llama", *flags)
    assert not (tmp_path / "llama" / "report.md").exists()


def test_an_option_out_of_bounds_is_refused() -> None:
    done = run(PANDA_TRAIN, *SAMPLE, "--arch", "gru-tiny", "--dropout", "1.5")
    assert done.returncode == 2
    assert "'1.5' is not a number >= 0 and < 1" in done.stderr


def test_packed_rows_are_refused() -> None:
    """The state is carried from token to token, across samples too."""
    done = run(PANDA, "check", *SAMPLE, "--arch", "gru-tiny", "--batching", "packed")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "cannot keep the samples of a row apart" in done.stderr


def test_the_configuration_learns(tmp_path: Path) -> None:
    half = ("--num_train_epochs", "0.75")  # half of the file's 1.5: 254 steps
    done = run(PANDA_TRAIN, "--config", str(CONFIG), *half, *NOTHING_DRAWN, "--output_dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    course = losses(tmp_path / "run")
    assert course[0] > 5
    assert sum(course[-20:]) / 20 < 2
