"""Writing and loading checkpoints.

DeepSpeed writes module and optimizer, and each rank writes its random state beside them. Frozen weights
are not written: they are there again when the engine is made again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from collections.abc import Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from panda.engine.checkpoints.folders import LATEST
from panda.engine.checkpoints.folders import MANIFEST
from panda.engine.checkpoints.folders import Progress
from panda.engine.checkpoints.folders import check_contents
from panda.engine.checkpoints.folders import checkpoint_name
from panda.engine.checkpoints.folders import complete_checkpoints
from panda.engine.checkpoints.folders import step_of
from panda.engine.checkpoints.random_state import load_random_state
from panda.engine.checkpoints.random_state import random_states
from panda.engine.checkpoints.random_state import write_random_state
from panda.engine.checkpoints.redistribution import describe_layout
from panda.engine.checkpoints.redistribution import layout_file
from panda.engine.checkpoints.redistribution import redistribute
from panda.engine.engine import Engine
from panda.files.disk_full import writing
from panda.files.whole import aside
from panda.files.whole import put
from panda.files.whole import remove
from panda.files.whole import sync
from panda.files.whole import whole
from panda.registry import UserError


def save_checkpoint(
    engine: Engine,
    folder: Path,
    progress: Progress,
    agreement: dict[str, Any],
    *,
    keep: int | None = None,
    kept: Collection[int] = (),
    write: Callable[[Path], None] = lambda checkpoint: None,
) -> Path:
    """Write ``folder/step-N`` and point ``latest`` at it; then remove all but the newest ``keep``, and those of steps
    in ``kept``.

    Every rank must call this. ``write`` adds files of the run to the checkpoint before it is complete. A run that loads
    the checkpoint has to agree with ``agreement``. Raises UserError on every rank if the disk of one is full; earlier
    checkpoints are untouched then.
    """
    processes = engine.processes
    final = folder / checkpoint_name(progress.step)
    temporary = aside(final)

    def prepare() -> None:
        if processes.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".tmp-*"):  # of interrupted saves
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            temporary.mkdir()

    def write_own() -> None:
        engine.save(folder, temporary.name)
        write_random_state(temporary, processes.rank)
        if layout := describe_layout(engine):
            layout_file(temporary, processes.rank).write_text(json.dumps(layout) + "\n", encoding="utf-8")
        write(temporary)

    def complete() -> None:
        if processes.rank == 0:
            _complete(temporary, final, {"format": 1, "progress": asdict(progress), "agreement": agreement})
            for old in complete_checkpoints(folder)[:-keep] if keep else []:
                if step_of(old) not in kept:
                    remove(old)

    before = complete_checkpoints(folder)
    untouched = f"The newest complete one, {before[-1].name}, is untouched." if before else "None was complete before."
    then = f"{untouched} Make room, and go on with `--resume auto`; `save_total_limit` keeps fewer checkpoints."
    try:
        for part in (prepare, write_own, complete):
            processes.together(writing(f"{folder}: the checkpoint of step {progress.step:,}", then)(part))
    except Exception:
        if processes.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # it is of no use, and its room is needed
        raise
    return final


def _complete(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Turn ``temporary``, which all ranks have written, into the checkpoint ``final``, and point ``latest`` at it."""
    files = sorted(file for file in temporary.rglob("*") if file.is_file())
    manifest["files"] = {str(file.relative_to(temporary)): file.stat().st_size for file in files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    with whole(final.with_name(LATEST)) as pointer:
        pointer.write_text(final.name + "\n", encoding="utf-8")
        sync(pointer)  # before the renaming, after which nothing is written that may lack room
        put(temporary, final)


def load_checkpoint(engine: Engine, checkpoint: Path) -> bool:
    """Restore weights, optimizer and this rank's random state.

    With the same ranks, ZeRO stage and so on they are restored bit for bit. Otherwise each rank gets its
    new part of them, random state stays as it is, and the result is False. Raises UserError on every rank
    if a file has another content than was written.
    """
    processes = engine.processes
    files = sorted(checkpoint.rglob("*.pt"))[processes.rank :: processes.world_size]  # one rank checks each
    processes.together(partial(check_contents, checkpoint, files))
    if not _is_as_saved(engine, checkpoint):
        redistribute(engine, checkpoint)
        return False
    if not engine.load(checkpoint.parent, checkpoint.name):
        raise UserError(f"{checkpoint}: DeepSpeed finds no checkpoint there.")
    load_random_state(checkpoint, engine.processes.rank)
    return True


def _is_as_saved(engine: Engine, checkpoint: Path) -> bool:
    """Whether every rank holds what the rank of the same number held."""
    ranks = len(random_states(checkpoint))
    file = layout_file(checkpoint, engine.processes.rank)
    saved = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    same = ranks == engine.processes.world_size and saved == describe_layout(engine)
    return engine.processes.all_(same)
