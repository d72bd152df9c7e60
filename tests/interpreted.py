"""Triton's kernels without a GPU: in its interpreter.

Triton reads TRITON_INTERPRET when it is imported, so tests of kernels then run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version

import pytest
import torch
from launching import ENVIRONMENT

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
anywhere = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU: interpreted instead")


def _triton_version() -> tuple[int, ...]:
    """(0,) where there is none."""
    try:
        return tuple(map(int, version("triton").split(".")[:2]))
    except PackageNotFoundError:
        return (0,)


with_numpy = pytest.mark.skipif(_triton_version() < (3, 7), reason="no Triton whose interpreter knows numpy 2.4")


def passed_in_interpreter(file: str, selected: str = "") -> str:
    """The last line of pytest about the tests of ``file``, or those that ``-k selected`` names, all of which pass."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "-k", selected, file]
    done = subprocess.run(command, env=ENVIRONMENT | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return f" {done.stdout.splitlines()[-1]}"
