"""Train 2N = train N, stop, resume, N more: the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from launching import BIN
from launching import ENVIRONMENT
from launching import exported_weights
from launching import losses
from launching import run_panda
from launching import train_many

SMALL = (
    *("--arch", "llama-tiny", "--num_layers", 2, "--hidden_size", 32, "--intermediate_size", 48, "--num_heads", 2),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 48, "--num_workers", 0),
    *("--per_gpu_train_batch_size", 3, "--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine"),
    *("--warmup_steps", 2, "--max_steps", 6, "--save_steps", 3),
)
STAGES = {1: (0, 1), 2: (0, 1, 2, 3)}
"""ZeRO stages to try, by number of ranks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each ranks and stage, a run of 6 steps, and one that continues a copy of its third step."""
    folder = tmp_path_factory.mktemp("resume")
    for ranks, stages in STAGES.items():
        runs = []
        for stage in stages:
            name = f"{ranks}-{stage}"
            runs.append([*SMALL, "--zero_stage", stage, "--output_dir", folder / name])
            checkpoint = folder / name / "checkpoints" / "step-00000003"
            resumed = folder / f"{name}-resumed"
            runs.append([*SMALL, "--zero_stage", stage, "--output_dir", resumed, "--resume", checkpoint])
        packed, whole = [*SMALL, "--batching", "packed", "--zero_stage", stages[-1]], folder / f"{ranks}-packed"
        runs.append([*packed, "--output_dir", whole])
        checkpoint = whole / "checkpoints" / "step-00000003"
        runs.append([*packed, "--output_dir", folder / f"{ranks}-packed-resumed", "--resume", checkpoint])
        train_many(runs, ranks=ranks, cwd=folder)
    return folder


@pytest.mark.parametrize(
    "name", [f"{ranks}-{what}" for ranks, stages in STAGES.items() for what in (*stages, "packed")]
)
def test_a_resumed_run_ends_with_the_same_bits(folder: Path, name: str) -> None:
    whole, resumed = folder / name, folder / f"{name}-resumed"
    assert losses(whole)[3:] == losses(resumed)
    expected, got = exported_weights(whole), exported_weights(resumed)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    progress = [
        json.loads((run / "checkpoints/step-00000006/manifest.json").read_text())["progress"]
        for run in (whole, resumed)
    ]
    assert progress[0] == progress[1]


def test_killed_at_any_moment_resume_auto_ends_with_the_same_bits(folder: Path) -> None:
    """The run is killed without warning, twice, and continued in its own directory."""
    flags = [*map(str, SMALL[:-1]), "2", "--output_dir", str(folder / "killed"), "--resume", "auto"]
    for step in (2, 4):
        process = subprocess.Popen(
            [str(BIN / "panda-train"), *flags], cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while not (folder / f"killed/checkpoints/step-{step:08d}").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = run_panda("panda-train", *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert losses(folder / "killed") == losses(folder / "1-0")
    expected, got = exported_weights(folder / "1-0"), exported_weights(folder / "killed")
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_a_run_of_another_shape_is_refused(folder: Path) -> None:
    done = run_panda(
        "panda-train", *SMALL, "--seed", 43, "--resume", folder / "1-0", "--output_dir", folder / "x", cwd=folder
    )
    assert done.returncode == 2
    assert "seed was 42 and is 43" in done.stderr


def test_a_directory_that_holds_a_run_is_not_overwritten(folder: Path) -> None:
    before = (folder / "1-0/metrics.jsonl").read_text()
    done = run_panda("panda-train", *SMALL, "--output_dir", folder / "1-0", cwd=folder)
    assert done.returncode == 2
    assert "is not empty" in done.stderr and "--resume auto" in done.stderr
    assert (folder / "1-0/metrics.jsonl").read_text() == before


def test_nothing_to_resume_is_an_error(folder: Path) -> None:
    done = run_panda("panda-train", *SMALL, "--resume", folder / "nowhere", cwd=folder)
    assert done.returncode == 2
    assert "no complete checkpoint at" in done.stderr
