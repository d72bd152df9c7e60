"""Runs panda as a user does: from the command line, in separate processes.

They are forks of a process that has imported torch, DeepSpeed and transformers (panda/testing/). Starts by a shell and
by torchrun are tested in test_installed_plugin.py and, through the plugin's own tests, in test_example_plugin.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from panda.testing.processes import run_script as run_script
from panda.testing.processes import start as start
from panda.testing.runs import ZERO3_AT_ONCE as ZERO3_AT_ONCE
from panda.testing.runs import train_several

TESTS = Path(__file__).parent
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1"}
EVERY_WAY = bool(os.environ.get("PANDA_EVERY_WAY"))
"""Whether tests that try a choice of many ways try all of them."""


def zero3_at_once(folder: Path) -> list[object]:
    """Flags of a run with this ZeRO-3; writes a file to ``folder``."""
    return _zero3(folder / "zero3_at_once.json", ZERO3_AT_ONCE)


def zero3_ahead(folder: Path) -> list[object]:
    """Flags of a run with ZeRO-3 that partitions every weight, and fetches it ahead; writes a file to ``folder``."""
    return _zero3(folder / "zero3_ahead.json", {"stage3_param_persistence_threshold": 0})


def _zero3(file: Path, options: dict[str, int]) -> list[object]:
    file.write_text(json.dumps({"zero_optimization": options}))
    return ["--zero_stage", 3, "--deepspeed_config", file]


def run_panda(command: str, *argv: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``panda-train ...`` or ``panda ...`` in ``cwd``; whatever its exit code."""
    with start(BIN / command, *argv, cwd=cwd, **environment) as started:
        return started.wait()


def run_code(code: str, *argv: object, cwd: Path) -> str:
    """Run ``code`` in a process without panda, and return its output. Raises AssertionError if it fails."""
    script = cwd / "code.py"
    script.write_text(code)
    return run_script(script, *argv, cwd=cwd)


def train_many(configurations: list[list[object]], *, ranks: int = 1, cwd: Path, **environment: str) -> str:
    """Train each of ``configurations`` on ``ranks`` processes, and return the output. Fails if they do."""
    return train_several(configurations, ranks=ranks, cwd=cwd, **environment)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The loss of each step of a run."""
    return [record["loss"] for record in metrics(run) if "loss" in record]


def assert_same_end(resumed: Path, whole: Path, *, after: int) -> None:
    """``resumed`` took the steps of ``whole`` that follow step ``after``, and exports the same weights, to the bit."""
    assert losses(resumed) == losses(whole)[after:], (losses(resumed), losses(whole)[after:])
    exports = [next((run / "export").glob("*.safetensors")) for run in (resumed, whole)]
    found, expected = map(load_file, exports)
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different, different


def exported_weights(run: Path) -> dict[str, Any]:
    """The weights that a run exported, by name."""
    return load_file(run / "export" / "model.safetensors")
