"""The manifest of a checkpoint: how far the run had come, and the files with their sizes and sha256. Imports no torch.

A file that was changed later does not match the manifest, and a manifest that was changed does not match the sha256 at
its own end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from panda.engine.checkpoints.agreement import refuse_differing
from panda.files.whole import write_whole
from panda.registry import UserError

FORMAT = 2
"""Of checkpoints that this version writes. 1, of before 0.1.0, had no sha256."""
MANIFEST = "manifest.json"
_END = ',\n  "sha256": "{}"\n}}\n'
"""How a manifest ends."""
HASHING_THREADS = 4
"""Files that a rank reads at once. One has about 1.7 GB hashed a second (2026-11-26, a core with SHA instructions)."""


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
    """Of ``step``, those that changed nothing because of what their loss or gradients were."""
    left_out_steps: int = 0
    """Of ``step``, those that a hook had left out."""
    learning_rate_factor: float = 1.0
    """By what hooks have scaled the learning rate."""
    evaluation_due: bool = False
    """Whether the evaluation of this step is still to be done: an interrupted run saves first."""
    skipped_in_a_row: int = 0
    """Of the last steps, those that were skipped: saved at the end of a run, and where a hook asks for a checkpoint."""


START = Progress()
"""Where a new run is."""


class DamagedError(UserError):
    """A checkpoint has another content than was written."""

    def __init__(self, checkpoint: Path, problem: str) -> None:
        others = [each for each in checkpoint.parent.glob("step-*") if (each / MANIFEST).is_file()]
        older = max((each for each in others if each.name < checkpoint.name), default=None)
        instead = f"The one before it is {older}." if older else "There is no older one beside it."
        super().__init__(f"{checkpoint}: the checkpoint is damaged: {problem}. {instead}")
        self.problem = problem


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
    """Write the manifest of ``checkpoint``, which nobody has found yet."""
    (checkpoint / MANIFEST).write_text(_text(manifest), encoding="utf-8")


def replace_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Write another manifest of ``checkpoint``, which is complete all the while."""
    write_whole(checkpoint / MANIFEST, _text(manifest))


def _text(manifest: Manifest) -> str:
    """What is written of ``manifest``, with a sha256 of all that is before it as its last entry."""
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=2).removesuffix("\n}")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text + _END.format(digest)


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


# -- compared with the files


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
