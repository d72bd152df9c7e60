"""The run directory: how it is chosen, and its parts.

docs/concepts.md lists its contents.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from panda.engine.checkpoints.folders import find_checkpoint
from panda.engine.checkpoints.folders import passed_over
from panda.files.own import refuse_links_out
from panda.registry import UserError
from panda.registry.location import problem_of_path
from panda.registry.location import resolve_path
from panda.registry.resolve import Resolved
from panda.run.description import BEGUN_FROM
from panda.run.description import read_provenance
from panda.run.directory_lock import RunLock
from panda.weights.run_folders import CHECKPOINTS
from panda.weights.run_folders import EXPORT as EXPORT
from panda.weights.run_folders import PROVENANCE as PROVENANCE
from panda.weights.run_folders import RUN_CONFIG as RUN_CONFIG

MODEL_FOLDER = "model"
"""The folder in it that describes its model: all of an export but the weights."""


def hold_continued(resolved: Resolved, lock: RunLock) -> tuple[Path | None, Path | None]:
    """The run directory to continue, and the checkpoint to continue from; each may be None.

    ``lock`` holds the directory, or where that is None the checkpoint, which may be that of a run that still trains.
    Raises UserError as ``find_directory`` does, and if another process holds the directory.
    """
    directory, checkpoint = find_directory(resolved)
    if not continues_in_place(resolved, directory, checkpoint):
        if checkpoint is None or resolved.core.resume is None:
            return None, None
        held = lock.read(resolve_path(resolved.core.resume))
        return None, held or find_directory(resolved)[1]  # which raises UserError: it was removed since
    refuse_links_out(directory)
    lock.take(directory)
    # Looked up again: the previous holder of the lock may have saved checkpoints since.
    return directory, checkpoint_to_continue(resolved, directory, lock)


def checkpoint_to_continue(resolved: Resolved, directory: Path, lock: RunLock) -> Path | None:
    """The checkpoint from which the run in ``directory`` is continued; ``lock`` holds that of another run."""
    auto = resolved.core.resume == "auto"
    checkpoint = _newest_or_first(directory) if auto else find_directory(resolved)[1]
    return checkpoint if checkpoint is None or is_own(checkpoint, directory) else lock.read(checkpoint)


def is_own(checkpoint: Path, directory: Path) -> bool:
    """Whether ``checkpoint`` is of the run in ``directory``, and not of another one from which that began."""
    return checkpoint.resolve().parent == (directory / CHECKPOINTS).resolve()


def make_directory(resolved: Resolved, lock: RunLock) -> Path:
    """Make the directory of a run that does not continue one in place, and hold it by ``lock``.

    Raises UserError if that would mix two runs.
    """
    while True:
        directory, checkpoint = find_directory(resolved)
        begun = json.dumps({BEGUN_FROM: str(checkpoint.absolute())}) if checkpoint else ""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with (directory / PROVENANCE).open("x") as file:  # of several runs that start at once, one succeeds
                file.write(begun)
        except FileExistsError:
            if resolved.core.resume == "auto":
                lock.take(directory)
                raise UserError(
                    f"{directory}: another run has just started in it. Start again to continue that run."
                ) from None
            if not (directory / PROVENANCE).exists():  # there is no folder, and none can be made
                raise UserError(
                    f"output_dir: cannot make {str(directory)!r}: it, or a folder above it, is a file, or a link to"
                    " nothing. Make what the link names, or name another folder."
                ) from None
            continue  # takes the next number, or raises UserError if this directory was given
        except OSError as problem:
            raise UserError(f"output_dir: cannot make {str(directory)!r}: {problem.strerror}.") from None
        lock.take(directory)
        return directory


def make_directory_again(directory: Path, lock: RunLock) -> Path:
    """Make ``directory``, which was removed while a run used it, again, and hold it by ``lock``.

    If another has taken its place, one beside it with a number.
    """
    made = directory if not directory.exists() else _numbered(directory, exists=False)
    try:
        made.mkdir(parents=True)
        (made / PROVENANCE).touch()
    except OSError as problem:
        raise UserError(
            f"{directory}: it was removed while the run used it, and {made} cannot be made: {problem.strerror}. Its"
            " weights are lost since the last checkpoint that was copied elsewhere."
        ) from None
    lock.take(made)
    return made


def continues_in_place(resolved: Resolved, directory: Path, checkpoint: Path | None) -> bool:
    """Whether a run in ``directory``, from ``checkpoint``, continues the run that is already there."""
    owner = checkpoint.resolve().parent.parent if checkpoint else None
    return (directory / PROVENANCE).exists() and (resolved.core.resume == "auto" or owner == directory.resolve())


def names_checkpoint(resolved: Resolved, checkpoint: Path) -> bool:
    """Whether the user has named ``checkpoint`` itself, and not a run."""
    resume = resolved.core.resume
    return resume != "auto" and resolve_path(resume).resolve() == checkpoint.resolve()


def find_directory(resolved: Resolved) -> tuple[Path, Path | None]:
    """The run directory, and the checkpoint to continue from, if any. Creates and locks nothing.

    Raises UserError if that would mix two runs, or if the checkpoint does not exist.
    """
    options = resolved.core
    given = resolve_path(options.output_dir) if options.output_dir else None
    default = Path("runs") / run_name(resolved)
    if options.resume == "auto":
        directory = given or _numbered(default, exists=True)
        with _reaching(directory):
            if not (directory / PROVENANCE).exists():  # else it holds a run to continue
                _check_empty(directory)
            return directory, _newest_or_first(directory)
    if options.resume is None:
        return _new(given, default), None
    problem = problem_of_path(options.resume)
    checkpoint = None if problem else find_checkpoint(resolve_path(options.resume))
    if checkpoint is None:
        damaged = "".join(
            f" {path.name} is damaged: {why}."
            for path, why in ({} if problem else passed_over(resolve_path(options.resume))).items()
        )
        then = "Give a run directory, its `checkpoints`, or one `step-...` folder; or `auto`."
        if not problem and (resolve_path(options.resume) / PROVENANCE).is_file():
            begin = shlex.join(["panda-train", "--resume", "auto", "--output_dir", options.resume])
            then = f"`{begin}` begins the run again."
        raise UserError(f"resume: no complete checkpoint at {options.resume[:200]!r}.{damaged} {then}")
    is_in_run = checkpoint.absolute().parent.name == "checkpoints"
    if is_in_run and (given is None or given.resolve() == checkpoint.resolve().parent.parent):
        return given or checkpoint.parent.parent, checkpoint
    return _new(given, default), checkpoint


def _newest_or_first(directory: Path) -> Path | None:
    """The newest checkpoint of the run in ``directory``; where it has saved none, that of another from which it began.

    Raises UserError where that is gone: from random weights it would be another run.
    """
    if found := find_checkpoint(directory):
        return found
    if (begun_from := begun_from_another(directory)) is None:
        return None
    if (found := find_checkpoint(begun_from)) is None:
        raise UserError(
            f"resume: the run in {directory} began from {begun_from}, which is gone, and has no whole checkpoint of its"
            " own. Put that back; or start a run of its own in another `output_dir`."
        )
    return found


def begun_from_another(directory: Path) -> Path | None:
    """The checkpoint of another run from which that in ``directory`` began; None if it began by itself."""
    provenance = read_provenance(directory)
    earlier = provenance.get("earlier_starts")
    starts = [provenance, *reversed(earlier if isinstance(earlier, list) else [])]
    named = [start[BEGUN_FROM] for start in starts if isinstance(start, dict) and start.get(BEGUN_FROM)]
    return next((path for path in map(resolve_path, map(str, named)) if not is_own(path, directory)), None)


def recorded_configuration(resolved: Resolved) -> dict[str, Any]:
    """What config.yaml of the run that this one continues says; empty where there is none."""
    if resolved.core.resume is None:
        return {}
    directory, checkpoint = find_directory(resolved)
    return configuration_in(checkpoint.absolute().parent.parent if checkpoint else directory)


def configuration_in(run: Path) -> dict[str, Any]:
    """What config.yaml of ``run``, a run directory, says; empty where there is none."""
    try:
        values = yaml.safe_load((run / RUN_CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _new(given: Path | None, default: Path) -> Path:
    """The directory of a new run. Raises UserError if ``given`` is not empty."""
    if given is None:
        return _numbered(default, exists=False)
    with _reaching(given):
        _check_empty(given)
    return given


@contextmanager
def _reaching(directory: Path) -> Iterator[None]:
    """Goes around looking at ``directory``: raises UserError where that is not permitted, or its name is too long."""
    try:
        yield
    except OSError as problem:
        raise UserError(f"output_dir: cannot look at {str(directory)!r}: {problem.strerror}.") from None


def _check_empty(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output_dir: {str(directory)!r} is a file. Name a folder.")
    if directory.exists() and any(directory.iterdir()):
        raise UserError(
            f"output_dir: {str(directory)!r} is not empty. `--resume auto` continues the run in it; for a new run"
            " choose another directory, or move this one away."
        )


def run_name(resolved: Resolved) -> str:
    """The run's name: as given, or TASK-ARCH."""
    components = resolved.components
    shape = components.get("arch", components["model"]).component.name
    return resolved.core.run_name or f"{components['task'].component.name}-{shape}"


def _numbered(path: Path, *, exists: bool) -> Path:
    """``path``, ``path-2``, ``path-3``, ...: the first that does not exist, or the last that does."""
    number = 1
    last = path
    while True:
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        if not candidate.exists():
            return last if exists else candidate
        last = candidate
        number += 1
