"""Starts Python scripts and modules, alone or as the ranks of a run, in forks of a process that has imported torch.

Importing torch, DeepSpeed and transformers takes ten seconds of CPU time; a fork of a process that has done so takes
none (warm.py).
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
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
from typing import IO

WARM = Path(__file__).with_name("warm.py")
SERVER = "PANDA_TESTING_SERVER"
"""As in warm.py."""


@cache
def _own_cache() -> str:
    """A folder for the token caches of what is started, until this process ends."""
    folder = tempfile.mkdtemp(prefix="panda-testing-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def environment() -> dict[str, str]:
    """The environment of what is started: this process's, offline.

    One thread a process, where nothing else is said: the models of tests are so small that a second one only spins.
    """
    ours = dict(os.environ)
    ours.setdefault("OMP_NUM_THREADS", "1")
    if "PANDA_CACHE" not in ours:
        ours["PANDA_CACHE"] = _own_cache()
    return ours | {"HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class _Server:
    """The process from which the others are forked: one for all that this process starts."""

    orders: IO[str]
    answers: IO[str]
    environment: dict[str, str]
    """What its forks are given of this process's, besides what it had itself when it started."""


@cache
def _warm() -> _Server:
    served, *descriptors = map(int, os.environ.get(SERVER, "0").split())
    if served == os.getpid():  # `start(..., serving=True)` started this process
        orders, answers = descriptors
        return _Server(os.fdopen(orders, "w"), os.fdopen(answers), environment())
    # -P: the folder of warm.py is no place to import from
    command = [sys.executable, "-P", str(WARM)]
    started = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdin is not None and started.stdout is not None
    return _Server(started.stdin, started.stdout, {})


def _answer() -> list[int]:
    line = _warm().answers.readline()
    if not line:
        _warm.cache_clear()
        raise ChildProcessError(f"{WARM} has ended")
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
def start(
    script: Path | str, *argv: object, cwd: Path, ranks: int = 0, serving: bool = False, **variables: str
) -> Iterator[Started]:
    """Start a Python script, or a module by its dotted name: by itself, or as each of the ``ranks`` that torchrun
    would start. ``variables`` are added to its environment. ``serving``: it starts processes itself, by this function,
    as tests of a package do, and they are forks of the same process. More ranks than this machine has GPUs run on the
    CPU.

    One at a time; processes that still run at the end of the ``with`` are killed.
    """
    # The process from which the others are forked has the PYTHONPATH of its own start.
    variables = _warm().environment | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")} | variables
    environments = [variables]
    store = None
    if ranks:
        import torch
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        if 0 < torch.cuda.device_count() < ranks:
            variables |= {"CUDA_VISIBLE_DEVICES": ""}
        # As torchrun does, this process hosts the store at which the ranks meet: its port is taken once chosen.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        environments = [
            variables | group | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)
        ]
    command = [str(script), *map(str, argv)]
    with tempfile.TemporaryDirectory(prefix="panda-test-output-") as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        for file in (stdout, stderr):  # may be read before the process has opened it
            file.touch()
        order: dict[str, object] = {"argv": command, "cwd": str(cwd), "environments": environments}
        order |= {"is_module": isinstance(script, str), "stdout": str(stdout), "stderr": str(stderr)}
        print(json.dumps(order | {"serving": serving}), file=_warm().orders, flush=True)
        started = Started(command, _answer(), stdout, stderr)
        try:
            yield started
        finally:
            if started.ended is None:
                started.kill()
                _answer()
    del store  # until here


def run_script(script: Path | str, *argv: object, cwd: Path, ranks: int = 1, **variables: str) -> str:
    """Run a script or a module by itself, or on several ``ranks``, and return its output. Raises AssertionError if it
    fails."""
    several = ranks if ranks > 1 else 0
    with start(script, *argv, cwd=cwd, ranks=several, serving=False, **variables) as started:
        done = started.wait()
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
