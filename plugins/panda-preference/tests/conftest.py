"""Runs of panda, started as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import Train
from tiny import save

TESTS = Path(__file__).parent
# Before torch is imported, in the runs and here: the models are so small that a second thread only spins.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
NOTHING_DRAWN = ["-p", "no:plot", "-p", "no:tensorboard", "-p", "no:progress"]


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """``train(directory, ranks=1, fails=False, **options)``: trains, and returns what was printed."""
    folder = tmp_path_factory.mktemp("forks")
    environment = {**os.environ, "PANDA_CACHE": str(folder / "cache")}
    with subprocess.Popen(
        [sys.executable, str(TESTS / "forks.py")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None and server.stdout is not None

        def run(directory: Path, *flags: str, ranks: int = 1, fails: bool = False, **options: Any) -> str:
            words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
            log = folder / "log"
            log.unlink(missing_ok=True)
            argv = [*words, *flags, "--output_dir", str(directory), *NOTHING_DRAWN]
            print(json.dumps({"argv": argv, "ranks": ranks, "log": str(log)}), file=server.stdin, flush=True)
            codes = json.loads(server.stdout.readline())
            printed = log.read_text()
            assert any(codes) == fails, printed
            return printed

        yield run
        server.stdin.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model, its tokenizer and its rows."""
    folder = tmp_path_factory.mktemp("tiny")
    save(folder / "model")
    save(folder / "scorer", reward=True)
    save(folder / "teacher", phase=1.0)
    return folder
