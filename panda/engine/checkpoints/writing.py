"""Writing and loading checkpoints.

DeepSpeed writes module and optimizer, and each rank writes its random state beside them. Frozen weights
are not written: they are there again when the engine is made again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from panda.engine.checkpoints.deepspeed_files import load_deepspeed_files
from panda.engine.checkpoints.deepspeed_files import write_deepspeed_files
from panda.engine.checkpoints.folders import LATEST
from panda.engine.checkpoints.folders import checkpoint_name
from panda.engine.checkpoints.folders import complete_checkpoints
from panda.engine.checkpoints.folders import named_in
from panda.engine.checkpoints.folders import step_of
from panda.engine.checkpoints.hashing import HashedFiles
from panda.engine.checkpoints.in_use import remove_unless_read
from panda.engine.checkpoints.manifest import Manifest
from panda.engine.checkpoints.manifest import Progress
from panda.engine.checkpoints.manifest import check_contents
from panda.engine.checkpoints.manifest import read_manifest
from panda.engine.checkpoints.manifest import write_manifest
from panda.engine.checkpoints.random_state import load_random_state
from panda.engine.checkpoints.random_state import random_states
from panda.engine.checkpoints.random_state import write_random_state
from panda.engine.checkpoints.redistribution import describe_layout
from panda.engine.checkpoints.redistribution import layout_file
from panda.engine.checkpoints.redistribution import redistribute
from panda.engine.engine import Engine
from panda.engine.evaluated_weights import train_again
from panda.engine.processes import Processes
from panda.files.disk_full import writing
from panda.files.whole import aside
from panda.files.whole import put
from panda.files.whole import sync
from panda.files.whole import whole
from panda.registry import UserError


def save_checkpoint(
    engine: Engine,
    folder: Path,
    progress: Progress,
    agreement: dict[str, Any],
    *,
    passing: bool = False,
    write: Callable[[Path], Iterable[Path]] = lambda checkpoint: (),
) -> Path:
    """Write ``folder/step-N`` and point ``latest`` at it; ``finish_save`` then removes older ones.

    ``passing``: the next one replaces it. Every rank must call this. ``write`` adds files of the run to the checkpoint
    before it is complete, and returns those that this rank wrote. A run that loads the checkpoint has to agree with
    ``agreement``. Raises UserError on every rank if the disk of one is full; earlier checkpoints are untouched then.
    """
    processes = engine.processes
    final = folder / checkpoint_name(progress.step)
    temporary = aside(final)

    def prepare() -> None:
        if processes.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            remove_interrupted(folder)
            temporary.mkdir()

    own = HashedFiles(temporary)

    def write_own() -> None:
        write_deepspeed_files(engine, temporary, own)
        own.add(write_random_state(temporary, processes.rank))
        if layout := describe_layout(engine):
            described = layout_file(temporary, processes.rank)
            described.write_text(json.dumps(layout) + "\n", encoding="utf-8")
            own.add(described)
        for file in write(temporary):
            own.add(file)

    def complete() -> None:
        everywhere = processes.from_all(own.written)
        if processes.rank == 0:
            files = {name: written for each in everywhere for name, written in each.items()}
            _complete(temporary, final, Manifest(progress, agreement, dict(sorted(files.items())), passing))

    before = processes.together(lambda: complete_checkpoints(folder))
    untouched = f"The newest complete one, {before[-1].name}, is untouched." if before else "None was complete before."
    then = f"{untouched} Go on with `--resume auto`; `save_total_limit` keeps fewer checkpoints."
    try:
        for part in (prepare, write_own, complete):
            processes.together(writing(f"{folder}: the checkpoint of step {progress.step:,}", then)(part))
    except Exception:
        if processes.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # it is of no use, and its room is needed
        raise
    return final


def _complete(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Turn ``temporary``, which all ranks have written, into the checkpoint ``final``, and point ``latest`` at it."""
    for name, written in manifest.files.items():
        file = temporary / name
        if not file.is_file() or file.stat().st_size != written.size:
            raise UserError(
                f"output_dir: rank 0 does not find {file} with the {written.size:,} bytes that a rank wrote. The run"
                " directory has to be on a disk that all machines of a run share."
            )
    write_manifest(temporary, manifest)
    with _pointing_at(final):
        put(temporary, final)


@contextmanager
def _pointing_at(checkpoint: Path) -> Iterator[None]:
    """``latest`` names ``checkpoint`` at the end of the ``with`` statement, in which nothing need be written for it."""
    with whole(checkpoint.with_name(LATEST)) as pointer:
        pointer.write_text(checkpoint.name + "\n", encoding="utf-8")
        sync(pointer)
        yield


def finish_save(processes: Processes, folder: Path, step: int, *, keep: int | None, kept: Collection[int]) -> None:
    """Remove the checkpoints that are older than that of ``step``, which is complete: the passing ones, and of the
    others all but the newest ``keep``; none of steps in ``kept``.

    Points ``latest`` at it first, where the process that saved it ended before it had. Every rank must call this.
    Raises UserError where the disk fails.
    """
    newest = folder / checkpoint_name(step)

    def finish() -> None:
        if processes.rank == 0 and newest.is_dir():
            remove_interrupted(folder)
            if named_in(folder / LATEST) != newest:
                with _pointing_at(newest):
                    pass
            _remove_older(newest, keep, kept)

    processes.together(writing(str(folder), f"{newest.name} is untouched. Go on with `--resume auto`.")(finish))


def _remove_older(newest: Path, keep: int | None, kept: Collection[int]) -> None:
    """Remove the passing checkpoints that are older than ``newest``, and of all but the newest ``keep``.

    One that a process reads now stays; the next save removes it, should there be one.
    """
    older = [path for path in complete_checkpoints(newest.parent) if step_of(path) < step_of(newest)]
    passing = [path for path in older if read_manifest(path).passing]
    lasting = [path for path in older if path not in passing]
    for old in [*passing, *(lasting[: len(lasting) + 1 - keep] if keep else [])]:
        if step_of(old) not in kept and not remove_unless_read(old):
            print(f"{old.name} stays, since another process reads it; the next save, if any, removes it", flush=True)


def remove_interrupted(folder: Path) -> None:
    """Remove what a process that was killed while it saved, or removed a checkpoint, has left in ``folder``."""
    for left in folder.glob(".tmp-*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def load_checkpoint(engine: Engine, checkpoint: Path, *, is_checked: bool = False) -> bool:
    """Restore weights, optimizer and this rank's random state.

    With the same ranks, ZeRO stage and so on they are restored bit for bit. Otherwise each rank gets its
    new part of them, random state stays as it is, and the result is False. Raises UserError on every rank
    if a file has another content than was written; ``is_checked``: none has.
    """
    processes = engine.processes
    if not is_checked:
        check_shared(processes, checkpoint)
    if not _is_as_saved(engine, checkpoint):
        processes.together(lambda: redistribute(engine, checkpoint))
        processes.together(lambda: train_again(engine))
        return False

    def load() -> None:
        load_deepspeed_files(engine, checkpoint)
        train_again(engine)
        load_random_state(checkpoint, processes.rank)

    processes.together(load)
    return True


def check_shared(processes: Processes, checkpoint: Path) -> None:
    """``check_contents`` of all files of ``checkpoint``, each on one of the ranks. All raise the first error."""

    def check() -> None:
        files = [checkpoint / name for name in read_manifest(checkpoint).files]
        check_contents(checkpoint, files[processes.rank :: processes.world_size])

    processes.together(check)


def _is_as_saved(engine: Engine, checkpoint: Path) -> bool:
    """Whether every rank holds what the rank of the same number held."""

    def is_same() -> bool:
        ranks = len(random_states(checkpoint))
        file = layout_file(checkpoint, engine.processes.rank)
        saved = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        return ranks == engine.processes.world_size and saved == describe_layout(engine)

    return engine.processes.all_(engine.processes.together(is_same))
