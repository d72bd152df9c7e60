"""Runs that a command line names, or that are found in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path

from panda.registry import UserError
from panda.registry.location import resolve_path
from panda.run.description import refuse_later
from panda.run.directory import PROVENANCE
from panda.run.directory import RUN_CONFIG
from panda.weights.run_folders import CHECKPOINTS
from panda.weights.run_folders import EXPORT


def run_folder(text: str) -> Path:
    """The run directory that ``text`` names. Raises UserError where it is none, or one of a later version of panda."""
    folder = resolve_path(text)
    if not is_run(folder):
        raise UserError(f"{text}: expected a run directory, with the config.yaml of its run in it.")
    refuse_later(folder)
    return folder


def run_folders(texts: Sequence[str]) -> list[Path]:
    """The run directories that ``texts`` name. Raises UserError where one is none, or is named twice."""
    folders = [run_folder(text) for text in texts]
    for number, folder in enumerate(folders):
        for text, other in zip(texts, folders[:number], strict=False):
            if folder.resolve() == other.resolve():
                same = "" if text == texts[number] else f", by {text} and {texts[number]}"
                raise UserError(f"{texts[number]}: this run is named twice{same}. Name it once.")
    return folders


def run_of(folder: Path) -> Path | None:
    """The run directory that ``folder`` is, or whose checkpoint or export it is; None where it is none.

    Raises UserError for one that a later version of panda has written.
    """
    places = [folder]
    places += [folder.absolute().parent] if folder.name in (EXPORT, CHECKPOINTS) else []
    places += [folder.absolute().parents[1]] if folder.absolute().parent.name == CHECKPOINTS else []
    run = next((each for each in places if is_run(each) and (each / PROVENANCE).is_file()), None)
    if run is not None:
        refuse_later(run)
    return run


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is a run directory."""
    return (folder / RUN_CONFIG).is_file()


def runs_below(folder: Path) -> Iterator[Path]:
    """The runs in ``folder`` and its folders, but not those within runs, by name."""
    for each in sorted(folder.iterdir()):
        if each.is_dir() and not each.is_symlink() and not each.name.startswith("."):
            if is_described(each):
                yield each
            else:
                yield from runs_below(each)


def is_described(folder: Path) -> bool:
    """Whether ``folder`` is a run that has begun."""
    return is_run(folder) and (folder / PROVENANCE).exists()


def short_names(folders: Sequence[Path]) -> list[str]:
    """A name for each of ``folders``: the parts of their paths, from the first that is not the same in all."""
    paths = [folder.absolute().parts for folder in folders]
    if len(set(paths)) < 2:
        return [folder.absolute().name for folder in folders]
    shared = 0
    while len({parts[: shared + 1] for parts in paths}) == 1:
        shared += 1
    return ["/".join(parts[shared:]) or parts[-1] for parts in paths]
