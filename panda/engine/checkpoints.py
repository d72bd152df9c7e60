"""Checkpoints: complete or absent.

A checkpoint is written under a temporary name, by all ranks; then rank 0 writes the manifest, which
lists every file with its size, renames the folder, and moves the pointer ``latest``. Whatever
moment the process dies at, each ``step-...`` folder is complete, and a damaged one is told by its
manifest. DeepSpeed writes module and optimizer; beside them each rank writes its random state.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from panda.engine.engine import Engine
from panda.registry import UserError

MANIFEST = "manifest.json"
LATEST = "latest"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Progress:
    """How far a run has come: all that resuming needs beside weights, optimizer and random state."""

    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """The data cursor: global position of the next sample."""
    tokens: int = 0
    supervised_tokens: int = 0


START = Progress()
"""Where a new run is."""


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
        shutil.rmtree(temporary, ignore_errors=True)  # what an interrupted save left
    processes.barrier()
    engine.deepspeed.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
    torch.save(_random_state(), temporary / f"random-{processes.rank:05d}.pt")
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
        if final.exists():  # the run was resumed from before it, and has come here again
            shutil.rmtree(final)
        os.rename(temporary, final)
        pointer = folder / f".tmp-{LATEST}"
        pointer.write_text(name + "\n", encoding="utf-8")
        _sync(pointer)
        os.replace(pointer, folder / LATEST)
        _sync(folder)
        for old in sorted(_complete(folder), reverse=True)[keep:] if keep else []:
            shutil.rmtree(old)
    processes.barrier()
    return final


def find_checkpoint(path: Path) -> Path | None:
    """The newest complete checkpoint at ``path``: itself, in it, or in its ``checkpoints``; None if there is none."""
    if (path / MANIFEST).exists():
        return path if _is_complete(path) else None
    for folder in (path, path / "checkpoints"):
        complete = sorted(_complete(folder))
        if complete:
            return complete[-1]
    return None


def read_progress(checkpoint: Path, shape: dict[str, Any]) -> Progress:
    """How far ``checkpoint`` had come. Raises UserError where it was made by a run of another ``shape``."""
    manifest = _manifest(checkpoint)
    differing = [
        f"{key} was {manifest['shape'].get(key)!r} and is {value!r}"
        for key, value in shape.items()
        if manifest["shape"].get(key) != value
    ]
    if differing:
        raise UserError(
            f"{checkpoint}: this run cannot continue that one: {'; '.join(differing)}."
            " Give the values that it had, or start a run of its own."
        )
    return Progress(**manifest["progress"])


def load_checkpoint(engine: Engine, checkpoint: Path) -> None:
    """Put weights, optimizer and this rank's random state back as they were. Loads pickles: trust the path."""
    loaded, _ = engine.deepspeed.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if loaded is None:
        raise UserError(f"{checkpoint}: DeepSpeed finds no checkpoint there.")
    _set_random_state(torch.load(checkpoint / f"random-{engine.processes.rank:05d}.pt", weights_only=False))


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and _is_complete(path)]


def _is_complete(checkpoint: Path) -> bool:
    try:
        files = _manifest(checkpoint)["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _manifest(checkpoint: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    return manifest


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
