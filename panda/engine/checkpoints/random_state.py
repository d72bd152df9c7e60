"""The state of the random generators of a rank, in a file of tensors."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save_file

from panda.engine.checkpoints.reading import load_old_random_state
from panda.registry import UserError


def random_states(checkpoint: Path) -> list[Path]:
    """The files of all ranks."""
    return sorted(checkpoint.glob("random-*.safetensors")) or sorted(checkpoint.glob("random-*.pt"))


def write_random_state(checkpoint: Path, rank: int) -> Path:
    """Write the state of this process's generators to ``checkpoint``, and return its file."""
    _, words, normal = random.getstate()
    _, keys, position, has_normal, cached = np.random.get_state()
    state = {
        "python": torch.tensor(words),
        "python.normal": torch.tensor([] if normal is None else [normal], dtype=torch.float64),
        "numpy": torch.from_numpy(np.array(keys, dtype=np.int64)),
        "numpy.position": torch.tensor([position, has_normal]),
        "numpy.normal": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    file = checkpoint / f"random-{rank:05d}.safetensors"
    save_file(state, file)
    return file


def load_random_state(checkpoint: Path, rank: int) -> None:
    """Set this process's generators as ``write_random_state`` found them. Raises UserError for a damaged file."""
    file = checkpoint / f"random-{rank:05d}.safetensors"
    try:
        state = _read(file) if file.exists() else load_old_random_state(file.with_suffix(".pt"))
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (SafetensorError, KeyError, ValueError, TypeError, IndexError, RuntimeError) as problem:
        raise UserError(
            f"{checkpoint}: the checkpoint is damaged: {file.name}: {problem}. Name an older one."
        ) from problem


def _read(file: Path) -> dict[str, Any]:
    state = load_file(file)
    normal = state["python.normal"].tolist()
    position, has_normal = state["numpy.position"].tolist()
    words = tuple(state["python"].tolist())
    return {
        **state,
        "python": (3, words, normal[0] if normal else None),
        "numpy": (
            "MT19937",
            state["numpy"].numpy().astype(np.uint32),
            position,
            has_normal,
            *state["numpy.normal"].tolist(),
        ),
    }
