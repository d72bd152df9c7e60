"""Where data is: paths, folders, patterns and data sets, and the files at them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from panda.data.data_sets import DataSet
from panda.data.data_sets import data_set_at
from panda.data.saved_splits import DESCRIPTIONS
from panda.data.saved_splits import DICT
from panda.data.saved_splits import is_saved
from panda.data.saved_splits import saved_splits
from panda.registry import UserError
from panda.registry.location import resolve_path

Locations = str | Sequence[str]
"""Where data is: a path, a pattern or a data set (see ``data_sets``), or several."""


def each_of(locations: Locations) -> tuple[str, ...]:
    """The paths and patterns that ``locations`` is."""
    return (locations,) if isinstance(locations, str) else tuple(locations)


def data_sets(locations: Locations) -> list[DataSet]:
    """Those of ``locations`` that are data sets."""
    return [found for location in each_of(locations) if (found := data_set_at(location)) is not None]


def identities(locations: Locations) -> set[tuple[int, int]]:
    """Device and inode of each file at ``locations``: a link to one has the same. Empty for none."""
    return {_identity(file) for location in each_of(locations) for file, _ in _all_files(location)}


def without(files: list[Path], held_out: set[tuple[int, int]]) -> list[Path]:
    """``files`` without those whose identities are in ``held_out``."""
    return [file for file in files if _identity(file) not in held_out]


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_dev, status.st_ino


def data_files(locations: Locations, suffixes: tuple[str, ...], option: str) -> list[Path]:
    """The files to read at ``locations``, in the order of these, and of each sorted by their paths.

    One is a file, a folder, which is read recursively, or a pattern of either; only hidden files and folders are left
    out. ``option`` is the key that errors name. Raises UserError where there is nothing to read.
    """
    return [file for files in files_by_location(locations, suffixes, option) for file in files]


def files_by_location(locations: Locations, suffixes: tuple[str, ...], option: str) -> list[list[Path]]:
    """The same files, by location. A file that several locations name belongs to the first one, and is read once."""
    texts = each_of(locations)
    if not texts:
        raise UserError(f"{option}: no path is given. Give a folder of {_named(suffixes)} files, or such files.")
    seen: set[tuple[int, int]] = set()
    found = []
    for text in texts:
        files = [file for file in _files_at(text, suffixes, option) if _identity(file) not in seen]
        if not files:
            raise UserError(f"{option}: all files of {text!r} are those of paths before it. Leave it out.")
        seen.update(map(_identity, files))
        found.append(files)
    return found


def _files_at(location: str, suffixes: tuple[str, ...], option: str) -> list[Path]:
    """The files to read at ``location``. Raises UserError where there are none."""
    try:
        data_set = data_set_at(location)
        candidates = _all_files(location) if data_set is None else []
    except UserError as problem:
        raise UserError(f"{option}: {problem}") from None
    if data_set is not None:
        return _readable(data_set, suffixes, option)
    found = [file for file, is_named in candidates if is_named or file.name.lower().endswith(suffixes)]
    if found:
        return found
    if not candidates and _is_pattern(location):
        raise UserError(f"{option}: nothing matches the pattern {location!r} (looked in {Path.cwd()}).")
    if not candidates and not os.path.exists(resolve_path(location)):
        raise UserError(
            f"{option}: {location!r} does not exist (looked in {Path.cwd()}). Give a folder of {_named(suffixes)}"
            " files, or one such file."
        )
    others = sorted({file.suffix or file.name for file, _ in candidates})
    hint = " `reader` says how files are read; `panda list readers`." if others else ""
    seen = f"it has {', '.join(others[:5])}" if others else "it is empty"
    raise UserError(f"{option}: {location!r} has no file that ends in {_named(suffixes)}; {seen}.{hint}")


def _readable(data_set: DataSet, suffixes: tuple[str, ...], option: str) -> list[Path]:
    """The files of ``data_set``. Raises UserError where the reader does not read all of them."""
    others = sorted({file.suffix or file.name for file in data_set.files if not file.name.lower().endswith(suffixes)})
    if others:
        raise UserError(
            f"{option}: {data_set.location} has files that end in {', '.join(others)}, and the reader reads"
            f" {_named(suffixes)}. `datasets.load_dataset(...).save_to_disk(FOLDER)` writes a folder that panda reads."
        )
    return list(data_set.files)


def _all_files(location: str) -> list[tuple[Path, bool]]:
    """The files at ``location``, sorted, each with whether ``location`` names it. One that is named has any ending.

    A pattern names what it matches if it has an ending: ``more/*.log`` does, ``more/*`` does not.
    """
    data_set = data_set_at(location)
    if data_set is not None:
        return [(file, True) for file in data_set.files]
    path = resolve_path(location)
    matches, named = [path], True
    if _is_pattern(location):
        matches = sorted(map(Path, glob(str(path), recursive=True)))
        named = not set("*?[]") & set(path.suffix or "*")
    found = {}
    for match in matches:
        if match.is_file():
            if not _describes_saved(match):
                found[match] = named
        elif match.is_dir():
            found.update({file: found.get(file, False) for file in sorted(_files_below(match))})
    return list(found.items())


def _is_pattern(location: str) -> bool:
    return bool(set("*?[") & set(location)) and not os.path.exists(resolve_path(location))


def other_files(locations: Locations, suffixes: tuple[str, ...]) -> Counter[str]:
    """The endings of the files at ``locations`` that ``data_files`` leaves out, with their number."""
    left_out = {
        file
        for location in each_of(locations)
        for file, is_named in _all_files(location)
        if not is_named and not file.name.lower().endswith(suffixes)
    }
    return Counter(file.suffix or file.name for file in left_out)


def _named(suffixes: tuple[str, ...]) -> str:
    return " or ".join(suffix for suffix in suffixes if not suffix.endswith(".gz"))


def _files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files that are not hidden. Links to folders are followed, except to one of those ``above``.

    A data set that `datasets` saved is its files. Raises UserError for one with several splits.
    """
    if saved := saved_splits(folder):
        if len(saved) > 1:
            raise UserError(
                f"{folder} is a data set with the splits {' and '.join(saved)}. Name it by itself, with one of them:"
                f" {folder}:{next(iter(saved))}"
            )
        yield from next(iter(saved.values()))
        return
    real = folder.resolve()
    for entry in folder.iterdir() if real not in above else ():
        if not entry.name.startswith("."):
            if entry.is_dir():
                yield from _files_below(entry, (*above, real))
            elif entry.is_file():
                yield entry


def _describes_saved(file: Path) -> bool:
    """Whether ``file``, which a pattern matches, describes a data set that `datasets` saved beside it."""
    return file.name in DESCRIPTIONS and (is_saved(file.parent) or (file.parent / DICT).is_file())
