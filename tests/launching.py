"""Runs panda as a user does: in processes of its own, from the command line.

They are forks of a process that has imported torch, DeepSpeed and transformers (warm.py). What a shell and torchrun
start is tried in test_installed_plugin.py and, through the plugin's own tests, in test_example_plugin.py.
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

from safetensors.torch import load_file
from torch.distributed import TCPStore

TESTS = Path(__file__).parent
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


@cache
def _warm() -> subprocess.Popen[str]:
    """The process that the others are forks of, one for all tests of this process."""
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
    """Processes of one command, as many as it has ranks."""

    command: list[str]
    pids: list[int]
    stdout: Path
    stderr: Path
    ended: list[int] | None = None
    """The exit code of each."""

    def kill(self) -> None:
        """End them at once, as `kill -9` would."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait(self, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """What they printed and the exit code of one that failed, when all have ended. Processes that run for longer
        than ``timeout`` seconds are ended, and that is an AssertionError with what they printed."""
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
    """Start a script of Python's: alone, or as each of the ``ranks`` that torchrun would start. One at a time; what
    runs on is ended."""
    environments = [environment]
    if ranks:
        # This process keeps the store that they meet at, as torchrun's does: its port is taken when it is chosen.
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
    """Run a script alone, or on each of several ``ranks``; what was printed. Fails with it."""
    with start(script, *argv, cwd=cwd, ranks=ranks if ranks > 1 else 0, **environment) as started:
        done = started.wait()
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_code(code: str, *argv: object, cwd: Path) -> str:
    """Run ``code`` in a process that has nothing of panda's; what was printed. Fails with it."""
    script = cwd / "code.py"
    script.write_text(code)
    return run_script(script, *argv, cwd=cwd)


def train_many(configurations: list[list[object]], *, ranks: int = 1, cwd: Path, **environment: str) -> str:
    """Train each of ``configurations`` on ``ranks`` processes; what was printed. Fails with it."""
    given = json.dumps([list(map(str, argv)) for argv in configurations])
    return run_script(TESTS / "train_many.py", given, cwd=cwd, ranks=ranks, **environment)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The loss of each step of a run."""
    return [record["loss"] for record in metrics(run)]


def exported_weights(run: Path) -> dict[str, Any]:
    """The weights that a run left, by name."""
    return load_file(run / "export" / "model.safetensors")
