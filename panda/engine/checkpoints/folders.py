"""Folders of checkpoints, complete or absent: finds them and reads their manifests. Imports no torch.

All ranks write a checkpoint under a temporary name; then rank 0 writes the manifest, which lists every
file with its size and sha256, renames the folder, and moves the pointer ``latest``. At whatever moment the process
dies, each ``step-...`` folder is complete. A file that was changed later does not match the manifest, and a manifest
that was changed does not match the sha256 at its own end.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from panda.registry import UserError

FORMAT = 2
"""Of checkpoints that this version writes. 1, of before 0.1.0, had no sha256."""
MANIFEST = "manifest.json"
_END = ',\n  "sha256": "{}"\n}}\n'
"""How a manifest ends."""
HASHING_THREADS = 4
"""Files that a rank reads at once. One has about 1.7 GB hashed a second (2026-11-26, a core with SHA instructions)."""
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
    evaluation_due: bool = False
    """Whether the evaluation of this step is still to be done: an interrupted run saves first."""


START = Progress()
"""Where a new run is."""


class DamagedError(UserError):
    """A checkpoint has another content than was written."""

    def __init__(self, checkpoint: Path, problem: str) -> None:
        super().__init__(
            f"{checkpoint}: the checkpoint is damaged: {problem}. Name an older one, or the run directory, in which the"
            " newest that is whole is found."
        )
        self.problem = problem


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
                return f"{name} has {found:,} bytes and had {written.size:,}"
    except OSError as problem:
        return f"{type(problem).__name__}: {problem}"
    except DamagedError as problem:
        return problem.problem
    return None


def set_aside(checkpoint: Path, why: str) -> Path:
    """Rename ``checkpoint``, ``WHY-1-step-...`` or the first number that is free, and return its new path."""
    number = 1
    while (target := checkpoint.with_name(f"{why}-{number}-{checkpoint.name}")).exists():
        number += 1
    return checkpoint.rename(target)


def check_contents(checkpoint: Path, files: Iterable[Path]) -> None:
    """Compare ``files`` of ``checkpoint`` with the sha256 that its manifest has of them.

    Raises DamagedError for a file that has another content than was written.
    """
    written = read_manifest(checkpoint).files

    def check(file: Path) -> None:
        name = str(file.relative_to(checkpoint))
        try:
            whole = name in written and _is_whole(file, written[name].sha256)
        except FileNotFoundError:
            raise DamagedError(checkpoint, f"{name} is missing") from None
        except OSError as problem:
            raise DamagedError(checkpoint, f"{name}: {problem.strerror}") from None
        if not whole:
            raise DamagedError(checkpoint, f"{name} has another content than was written")

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        list(pool.map(check, files))


def _is_whole(file: Path, sha256: str | None) -> bool:
    with file.open("rb") as stream:
        if sha256 is not None:
            return hashlib.file_digest(stream, "sha256").hexdigest() == sha256
        # Format 1 has the checksums of torch.save only, which torch.load of 2.14 does not read.
        try:
            return stream.read(2) != b"PK" or ZipFile(stream).testzip() is None
        except Exception:  # what zipfile raises depends on which byte it is
            return False


def read_progress(checkpoint: Path, agreement: dict[str, Any]) -> Progress:
    """How far ``checkpoint`` had come. Raises UserError where the run that made it differs in ``agreement``."""
    manifest = read_manifest(checkpoint)
    refuse_differing(checkpoint, manifest.agreement, agreement)
    return manifest.progress


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


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, by step, damaged ones too."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step at which ``checkpoint`` was saved, as its name says; 0 for a name that does not."""
    name = _NAME.fullmatch(checkpoint.name)
    return int(name[1]) if name else 0


# -- the manifest -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A file as a rank wrote it."""

    size: int
    """Bytes."""
    sha256: str | None
    """None in format 1."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    progress: Progress
    agreement: dict[str, Any]
    """The facts that a run which loads it has to share."""
    files: dict[str, Written]
    """By path in the checkpoint."""
    passing: bool = False
    """Whether a newer checkpoint replaces it: it was saved because of the time that had passed."""


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Write the manifest of ``checkpoint``, with a sha256 of all that is before it as its last entry."""
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=2).removesuffix("\n}")
    digest = hashlib.sha256(text.encode()).hexdigest()
    (checkpoint / MANIFEST).write_text(text + _END.format(digest), encoding="utf-8")


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of ``checkpoint``. Raises DamagedError if it is another than was written."""
    try:
        content = (checkpoint / MANIFEST).read_bytes()
    except OSError as problem:
        raise DamagedError(checkpoint, f"{type(problem).__name__}: {problem}") from None
    text, end = content[: -len(_END.format("0" * 64))], content[-len(_END.format("0" * 64)) :]
    is_whole = end == _END.format(hashlib.sha256(text).hexdigest()).encode()
    try:
        stated = json.loads(content.decode("utf-8"))
        if not is_whole and (type(stated["format"]) is not int or stated["format"] != 1):
            raise ValueError("its sha256 is another")
        if is_whole and stated["format"] > FORMAT:  # a manifest ends in the same way in every format after the first
            raise UserError(
                f"{checkpoint}: it was written by a later version of panda, in format {stated['format']}, and this one"
                f" reads up to {FORMAT}. Install that version."
            )
        return _manifest(stated)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise DamagedError(checkpoint, f"{MANIFEST} has another content than was written ({problem!r})") from None


def _manifest(stated: dict[str, Any]) -> Manifest:
    """The manifest that was ``stated``; raises any of several errors where it has another form."""
    progress = {**stated["progress"]}
    if "supervised_tokens" in progress:  # in checkpoints from before any loss had units (2026-11)
        progress["units"] = progress.pop("supervised_tokens")
    for key, value in progress.items():
        if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise ValueError(f"{key} is {value!r}")
    files = {
        name: Written(found, None) if stated["format"] == 1 else Written(**found)
        for name, found in stated["files"].items()
    }
    for name, written in files.items():
        if type(written.size) is not int or ".." in Path(name).parts or Path(name).is_absolute():
            raise ValueError(f"of {name!r} it has {written.size!r} bytes")
    return Manifest(Progress(**progress), {**stated["agreement"]}, files, bool(stated.get("passing", False)))
