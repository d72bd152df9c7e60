"""Runs panda as a user does: from the command line, in separate processes.

They are forks of a process that has imported torch, DeepSpeed and transformers (warm.py). Starts by a shell and
by torchrun are tested in test_installed_plugin.py and, through the plugin's own tests, in test_example_plugin.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore

TESTS = Path(__file__).parent
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1"}


ZERO3_AT_ONCE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
"""ZeRO-3 that partitions every weight, and releases it as soon as it has been used. By default it keeps the weights
of such small models whole, and code that needs them gathered would not be tested."""


def zero3_at_once(folder: Path) -> list[object]:
    """Flags of a run with this ZeRO-3; writes a file to ``folder``."""
    return _zero3(folder / "zero3_at_once.json", ZERO3_AT_ONCE)


def zero3_ahead(folder: Path) -> list[object]:
    """Flags of a run with ZeRO-3 that partitions every weight, and fetches it ahead; writes a file to ``folder``."""
    return _zero3(folder / "zero3_ahead.json", {"stage3_param_persistence_threshold": 0})


def _zero3(file: Path, options: dict[str, int]) -> list[object]:
    file.write_text(json.dumps({"zero_optimization": options}))
    return ["--zero_stage", 3, "--deepspeed_config", file]


@cache
def _warm() -> subprocess.Popen[str]:
    """The process from which the others are forked: one for all tests of this process."""
    command = [sys.executable, str(TESTS / "warm.py")]
    return subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _answer() -> list[int]:
    server = _warm()
    line = server.stdout.readline()  # type: ignore[union-attr]
    if not line:
        _warm.cache_clear()
        raise ChildProcessError(f"tests/warm.py ended with exit code {server.wait()}")
    numbers: list[int] = json.loads(line)
    return numbers


@dataclass
class Started:
    """The processes of one command, one for each rank."""

    command: list[str]
    pids: list[int]
    stdout: Path
    stderr: Path
    ended: list[int] | None = None
    """The exit code of each."""

    def kill(self) -> None:
        """Kill the processes, as `kill -9` would."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait(self, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """The output of the processes and the exit code of one that failed, once all have ended. If they run for longer
        than ``timeout`` seconds, kills them and raises AssertionError with their output."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(timeout, stop)
        timer.start()
        self.ended = _answer()
        timer.cancel()
        stdout, stderr = self.stdout.read_text(), self.stderr.read_text()
        assert not late.is_set(), f"after {timeout} s still ran: {' '.join(self.command)}\n{stdout}{stderr}"
        code = next((code for code in self.ended if code not in (0, -signal.SIGKILL)), min(self.ended))
        return subprocess.CompletedProcess(self.command, code, stdout, stderr)


@contextmanager
def start(script: Path, *argv: object, cwd: Path, ranks: int = 0, **environment: str) -> Iterator[Started]:
    """Start a Python script: by itself, or as each of the ``ranks`` that torchrun would start. One at a time; processes
    that still run at the end are killed."""
    environments = [environment]
    if ranks:
        # As torchrun does, this process hosts the store at which the ranks meet: its port is taken once chosen.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        environments = [
            environment | group | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)
        ]
    command = [str(script), *map(str, argv)]
    with tempfile.TemporaryDirectory(prefix="panda-test-output-") as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        order = {"argv": command, "cwd": str(cwd), "environments": environments}
        order |= {"stdout": str(stdout), "stderr": str(stderr)}
        print(json.dumps(order), file=_warm().stdin, flush=True)
        started = Started(command, _answer(), stdout, stderr)
        try:
            yield started
        finally:
            if started.ended is None:
                started.kill()
                _answer()


def run_panda(command: str, *argv: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``panda-train ...`` or ``panda ...`` in ``cwd``; whatever its exit code."""
    with start(BIN / command, *argv, cwd=cwd, **environment) as started:
        return started.wait()


def run_script(script: Path, *argv: object, cwd: Path, ranks: int = 1, **environment: str) -> str:
    """Run a script by itself, or on several ``ranks``, and return its output. Raises AssertionError if it fails."""
    with start(script, *argv, cwd=cwd, ranks=ranks if ranks > 1 else 0, **environment) as started:
        done = started.wait()
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_code(code: str, *argv: object, cwd: Path) -> str:
    """Run ``code`` in a process without panda, and return its output. Raises AssertionError if it fails."""
    script = cwd / "code.py"
    script.write_text(code)
    return run_script(script, *argv, cwd=cwd)


def train_many(configurations: list[list[object]], *, ranks: int = 1, cwd: Path, **environment: str) -> str:
    """Train each of ``configurations`` on ``ranks`` processes, and return the output. Fails if they do."""
    given = json.dumps([list(map(str, argv)) for argv in configurations])
    return run_script(TESTS / "train_many.py", given, cwd=cwd, ranks=ranks, **environment)


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
