"""Runs panda as a user does: in processes of its own, from the command line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


ZERO3_AT_ONCE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
"""ZeRO-3 that spreads every weight, and again as soon as it has been used. By default it keeps the weights of a
model as small as a test's whole, and what needs them gathered is not tried."""


def zero3_at_once(folder: Path) -> list[object]:
    """Flags of a run under such a ZeRO-3; writes a file to ``folder``."""
    file = folder / "zero3_at_once.json"
    file.write_text(json.dumps({"zero_optimization": ZERO3_AT_ONCE}))
    return ["--zero_stage", 3, "--deepspeed_config", file]


def run_panda(command: str, *argv: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``panda-train ...`` or ``panda ...`` in ``cwd``; whatever its exit code."""
    return subprocess.run(
        [str(BIN / command), *map(str, argv)],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def train_many(configurations: list[list[object]], *, ranks: int = 1, cwd: Path, **environment: str) -> str:
    """Train each of ``configurations`` on ``ranks`` processes; what was printed. Fails with it."""
    script = [
        str(Path(__file__).parent / "train_many.py"),
        json.dumps([list(map(str, argv)) for argv in configurations]),
    ]
    command = [sys.executable, *script]
    if ranks > 1:
        command = [str(BIN / "torchrun"), f"--nproc_per_node={ranks}", f"--master_port={free_port()}", *script]
    env = ENVIRONMENT | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The loss of each step of a run."""
    return [record["loss"] for record in metrics(run)]


def exported_weights(run: Path) -> dict[str, Any]:
    """The weights that a run left, by name."""
    return load_file(run / "export" / "model.safetensors")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
