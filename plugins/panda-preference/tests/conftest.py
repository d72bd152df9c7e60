"""Runs of panda, started as a user starts them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from panda.testing import train as train_by_name
from runs import Train
from tiny import save

# Before torch is imported: the models are so small that a second thread only spins.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def train() -> Train:
    """``train(directory, *flags, ranks=1, fails=False, **options)``: trains, and returns what was printed."""
    return lambda directory, *flags, **options: train_by_name(directory, *flags, **options).printed


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model, its tokenizer and its rows."""
    folder = tmp_path_factory.mktemp("tiny")
    save(folder / "model")
    save(folder / "scorer", reward=True)
    save(folder / "teacher", phase=1.0)
    return folder
