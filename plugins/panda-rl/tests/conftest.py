"""Runs of panda, started as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))
# Before torch is imported, in the runs and here: the models are so small that a second thread only spins.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

from making import install_given  # noqa: E402 - a module beside this file

NOTHING_DRAWN = ["-p", "no:plot", "-p", "no:tensorboard", "-p", "no:progress"]


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """``train(directory, *flags, ranks=1, fails=False, **options)``: trains, and returns what was printed.

    The task ``grpo-given`` of ``making.py`` is installed there.
    """
    folder = tmp_path_factory.mktemp("forks")
    paths = os.pathsep.join(filter(None, [str(install_given(folder / "site")), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PANDA_CACHE": str(folder / "cache"), "PYTHONPATH": paths}
    with subprocess.Popen(
        [sys.executable, str(TESTS / "forks.py")],
        env=environment,
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None and server.stdout is not None

        def run(directory: Path, *flags: str, ranks: int = 1, fails: bool = False, **options: Any) -> str:
            words = [word for key, value in options.items() for word in (f"--{key}", *map(str, _several(value)))]
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


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
