"""Folders of checkpoints, complete or absent: finds them and reads their manifests. Imports no torch.

All ranks write a checkpoint under a temporary name; then rank 0 writes the manifest, which lists every
file with its size, renames the folder, and moves the pointer ``latest``. At whatever moment the process
dies, each ``step-...`` folder is complete, and a file that was cut short later does not match the manifest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from panda.registry import UserError

MANIFEST = "manifest.json"
LATEST = "latest"
MOST_BYTES_OF_A_NAME = 100
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Progress:
    """How far a run has come: all that resuming needs besides weights, optimizer and random state."""

    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """The data cursor: global position of the next sample."""
    tokens: int = 0
    units: float = 0
    """Of the loss: supervised tokens, pairs."""
    skipped_steps: int = 0
    """Of ``step``, those that changed nothing because gradients were not finite."""
    left_out_steps: int = 0
    """Of ``step``, those that a hook had left out."""
    learning_rate_factor: float = 1.0
    """By what hooks have scaled the learning rate."""


START = Progress()
"""Where a new run is."""


def find_checkpoint(path: Path) -> Path | None:
    """The newest complete checkpoint: ``path`` itself, in it, or in its ``checkpoints``; None if there is none.

    Of a file such as ``checkpoints/best`` it is the one that the file names. Raises UserError if that, or ``path``, is
    a damaged checkpoint.
    """
    path = named_in(path)
    if (path / MANIFEST).exists():
        if problem := damage(path):
            raise UserError(f"{path}: the checkpoint is damaged: {problem}. Give an older one, or the run directory.")
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
        for checkpoint in reversed(_checkpoints(folder)):
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
    return [path for path in _checkpoints(folder) if damage(path) is None]


def damage(checkpoint: Path) -> str | None:
    """How ``checkpoint`` differs from its manifest; None if it does not."""
    try:
        for name, size in _manifest(checkpoint)["files"].items():
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes and had {size:,}"
    except (OSError, ValueError, KeyError) as problem:
        return f"{type(problem).__name__}: {problem}"
    return None


def set_aside_later(checkpoint: Path) -> list[Path]:
    """Rename the checkpoints after ``checkpoint`` in its folder to ``abandoned-...``, and return them.

    The run takes another course from there, and the newest checkpoint must be one of its own.
    """
    aside = []
    for later in _checkpoints(checkpoint.parent):
        if step_of(later) > step_of(checkpoint):
            number = 1
            while (target := later.with_name(f"abandoned-{number}-{later.name}")).exists():
                number += 1
            aside.append(later.rename(target))
    return aside


def check_contents(checkpoint: Path, files: Iterable[Path]) -> None:
    """Compare ``files`` of ``checkpoint`` with the checksums that torch.save writes.

    torch.load of 2.14 does not read them; this can go when it does. About as fast as loading: 1.9 s and 2.3 s
    a gigabyte, on two CPU cores. Raises UserError for a file that has another content than was written.
    """
    for file in files:
        try:
            with file.open("rb") as stream:
                is_zip = stream.read(2) == b"PK"  # torch.save can be told to write its older format, without checksums
                damaged = is_zip and ZipFile(stream).testzip() is not None
        except Exception:  # what zipfile raises depends on which byte it is
            damaged = True
        if damaged:
            raise UserError(
                f"{checkpoint}: the checkpoint is damaged: {file.name} has another content than was written. Name"
                " an older one."
            )


def read_progress(checkpoint: Path, agreement: dict[str, Any]) -> Progress:
    """How far ``checkpoint`` had come. Raises UserError where the run that made it differs in ``agreement``."""
    manifest = _manifest(checkpoint)
    refuse_differing(checkpoint, manifest["agreement"], agreement)
    progress = dict(manifest["progress"])
    if "supervised_tokens" in progress:  # in checkpoints from before any loss had units (2026-11)
        progress["units"] = progress.pop("supervised_tokens")
    return Progress(**progress)


def refuse_differing(source: Path, recorded: dict[str, Any], agreement: dict[str, Any]) -> None:
    """Raise UserError where what ``source`` ``recorded`` of its run differs from ``agreement``, of this one.

    What only one of the two runs states is not compared: a newer component may have gained an option.
    """
    here = json.loads(json.dumps(agreement))  # as what was written and read again: a tuple is a list
    differing = [
        f"{key} was {before!r} and is {here[key]!r}"
        for key, before in recorded.items()
        if key in here and here[key] != before
    ]
    if differing:
        raise UserError(
            f"{source}: this run cannot continue that one: {'; '.join(differing)}."
            " Give the values that it had, or start a run of its own."
        )


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step at which ``checkpoint`` was saved, as its name says; 0 for a name that does not."""
    name = _NAME.fullmatch(checkpoint.name)
    return int(name[1]) if name else 0


def _manifest(checkpoint: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    return manifest
