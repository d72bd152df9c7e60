"""Writing and loading checkpoints.

DeepSpeed writes module and optimizer; beside them each rank writes its random state.
Frozen weights are not written: whoever makes the engine again makes them again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from panda.engine.checkpoint_folders import LATEST
from panda.engine.checkpoint_folders import MANIFEST
from panda.engine.checkpoint_folders import Progress
from panda.engine.checkpoint_folders import complete_checkpoints
from panda.engine.engine import Engine
from panda.engine.redistribution import describe_layout
from panda.engine.redistribution import layout_file
from panda.engine.redistribution import redistribute
from panda.registry import UserError


def save_checkpoint(
    engine: Engine, folder: Path, progress: Progress, shape: dict[str, Any], *, keep: int | None = None
) -> Path:
    """Write ``folder/step-N`` and point ``latest`` at it; then remove all but the newest ``keep``.

    Every rank has to call it. ``shape`` is what a run that loads it must agree on.
    """
    processes = engine.processes
    name = f"step-{progress.step:08d}"
    temporary, final = folder / f".tmp-{name}", folder / name
    if processes.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".tmp-*"):  # by interrupted saves
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    processes.barrier()
    engine.save(folder, temporary.name)
    torch.save(_random_state(), temporary / f"random-{processes.rank:05d}.pt")
    if layout := describe_layout(engine):
        layout_file(temporary, processes.rank).write_text(json.dumps(layout) + "\n", encoding="utf-8")
    processes.barrier()
    if processes.rank == 0:
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        manifest = {
            "format": 1,
            "progress": asdict(progress),
            "shape": shape,
            "files": {str(file.relative_to(temporary)): file.stat().st_size for file in files},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for file in (*files, temporary / MANIFEST, temporary):
            _sync(file)
        os.rename(temporary, final)
        pointer = folder / f".tmp-{LATEST}"
        pointer.write_text(name + "\n", encoding="utf-8")
        _sync(pointer)
        os.replace(pointer, folder / LATEST)
        _sync(folder)
        for old in complete_checkpoints(folder)[:-keep] if keep else []:
            os.rename(old, folder / f".tmp-{old.name}")  # at once: a folder that is half removed is no checkpoint
            shutil.rmtree(folder / f".tmp-{old.name}")
    processes.barrier()
    return final


def load_checkpoint(engine: Engine, checkpoint: Path) -> bool:
    """Put weights, optimizer and this rank's random state back. Loads pickles: trust the path.

    Where ranks, ZeRO stage and the like are what they were, it is to the bit. Where they are not, each
    rank gets what is its own now; random state is left as it is then, and the result is False.
    """
    if not _is_as_saved(engine, checkpoint):
        redistribute(engine, checkpoint)
        return False
    if not engine.load(checkpoint.parent, checkpoint.name):
        raise UserError(f"{checkpoint}: DeepSpeed finds no checkpoint there.")
    _set_random_state(torch.load(checkpoint / f"random-{engine.processes.rank:05d}.pt", weights_only=False))
    return True


def _is_as_saved(engine: Engine, checkpoint: Path) -> bool:
    """Whether every rank holds what the rank of its number held."""
    ranks = len(list(checkpoint.glob("random-*.pt")))
    file = layout_file(checkpoint, engine.processes.rank)
    saved = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    same = ranks == engine.processes.world_size and saved == describe_layout(engine)
    return engine.processes.all_(same)


def _sync(path: Path) -> None:
    """Have the system write ``path`` to disk before what follows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
