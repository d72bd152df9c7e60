"""Runs of panda, started as a user starts them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# Before torch is imported: the models are so small that a second thread only spins.
os.environ["OMP_NUM_THREADS"] = "1"

from making import install_given
from panda.testing import train as train_by_name


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``train(directory, *flags, ranks=1, fails=False, **options)``: trains, and returns what was printed.

    The task ``grpo-given`` of ``making.py`` is installed there.
    """
    site = install_given(tmp_path_factory.mktemp("given") / "site")
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))}
    return lambda directory, *flags, **options: train_by_name(directory, *flags, variables=paths, **options).printed
