"""Folders of checkpoints, complete or absent: finds them. Imports no torch.

All ranks write a checkpoint under a temporary name; then rank 0 writes the manifest, which lists every
file with its size and sha256, renames the folder, and moves the pointer ``latest``. At whatever moment the process
dies, each ``step-...`` folder is complete.
"""

from __future__ import annotations

import re
from pathlib import Path

from panda.engine.checkpoints.manifest import MANIFEST
from panda.engine.checkpoints.manifest import DamagedError
from panda.engine.checkpoints.manifest import read_manifest
from panda.files.terminal import number_of

LATEST, BEST = "latest", "best"
"""Files beside checkpoints that name one: the newest, and that of the best evaluation (plugin ``best_checkpoint``)."""
MOST_BYTES_OF_A_NAME = 100
_NAME = re.compile(r"step-(\d{8,})")


def find_checkpoint(path: Path) -> Path | None:
    """The newest complete checkpoint: ``path`` itself, in it, or in its ``checkpoints``; None if there is none.

    Of a file such as ``checkpoints/best`` it is the one that the file names. Raises UserError if that, or ``path``, is
    a damaged checkpoint.
    """
    path = named_in(path)
    if (path / MANIFEST).exists():
        if problem := damage(path):
            raise DamagedError(path, problem)
        return path
    for folder in (path, path / "checkpoints"):
        if complete := complete_checkpoints(folder):
            return complete[-1]
    return None


def named_in(path: Path) -> Path:
    """The checkpoint that ``path``, a file such as ``checkpoints/latest``, names; ``path`` if it is no such file."""
    if not path.is_file() or path.stat().st_size > MOST_BYTES_OF_A_NAME:
        return path
    name = path.read_text(encoding="utf-8", errors="replace").strip()
    return path.with_name(name) if _NAME.fullmatch(name) else path


def passed_over(path: Path) -> dict[Path, str]:
    """Damaged checkpoints at ``path`` that are newer than the one ``find_checkpoint`` finds, each with the damage.

    Newest first.
    """
    found = find_checkpoint(path)
    if found == named_in(path):  # the user named it
        return {}
    damaged: dict[Path, str] = {}
    for folder in (path, path / "checkpoints"):
        for checkpoint in reversed(checkpoints(folder)):
            if checkpoint == found:
                return damaged
            if problem := damage(checkpoint):
                damaged[checkpoint] = problem
    return damaged


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint of ``step`` in its folder."""
    return f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, by step."""
    return [path for path in checkpoints(folder) if damage(path) is None]


def damage(checkpoint: Path) -> str | None:
    """How ``checkpoint`` differs from its manifest, as far as sizes tell; None if it does not.

    Raises UserError if a later version of panda wrote it.
    """
    try:
        for name, written in read_manifest(checkpoint).files.items():
            found = (checkpoint / name).stat().st_size
            if found != written.size:
                return f"{name} has {number_of(found, 'byte')} and had {written.size:,}"
    except FileNotFoundError as problem:
        return f"{Path(problem.filename).name} is missing"
    except OSError as problem:
        return str(problem)
    except DamagedError as problem:
        return problem.problem
    return None


def set_aside(checkpoint: Path, why: str) -> Path:
    """Rename ``checkpoint``, ``WHY-1-step-...`` or the first number that is free, and return its new path."""
    drop_pointers(checkpoint)
    number = 1
    while (target := checkpoint.with_name(f"{why}-{number}-{checkpoint.name}")).exists():
        number += 1
    return checkpoint.rename(target)


def drop_pointers(checkpoint: Path) -> None:
    """Remove the files that name ``checkpoint``, which is about to lose its name."""
    for pointer in (checkpoint.with_name(LATEST), checkpoint.with_name(BEST)):
        if named_in(pointer) == checkpoint:
            pointer.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, by step, damaged ones too."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step at which ``checkpoint`` was saved, as its name says; 0 for a name that does not."""
    name = _NAME.fullmatch(checkpoint.name)
    return int(name[1]) if name else 0
