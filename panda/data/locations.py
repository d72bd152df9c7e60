"""Where data is: paths, folders, patterns and data sets, and the files at them."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence
from fnmatch import fnmatchcase
from glob import glob
from pathlib import Path

from panda.data.data_sets import DataSet
from panda.data.data_sets import data_set_at
from panda.data.packed_files import ENDINGS
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
    """Device and inode of ``file``. Raises UserError for a link to nothing, and for what is no file."""
    try:
        status = file.stat()
    except OSError as problem:
        raise UserError(f"{file}: cannot be read: {_reason(file, problem)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{file}: neither a file nor a folder. A pipe is read where its own path is given.")
    return status.st_dev, status.st_ino


def _reason(path: Path, problem: OSError) -> str:
    if path.is_symlink() and isinstance(problem, FileNotFoundError):
        return f"it is a link to {os.readlink(path)!r}, which does not exist"
    return problem.strerror or str(problem)


def data_files(locations: Locations, suffixes: tuple[str, ...], option: str) -> list[Path]:
    """The files to read at ``locations``, in the order of these, and of each sorted by their paths.

    One is a file, a folder, which is read recursively, or a pattern of either; only hidden files and folders are left
    out. ``option`` is the key that errors name. Raises UserError where there is nothing to read, or it cannot be read.
    """
    return [file for files in files_by_location(locations, suffixes, option) for file in files]


def files_by_location(locations: Locations, suffixes: tuple[str, ...], option: str) -> list[list[Path]]:
    """The same files, by location. A file to which several paths lead is read once, at the first of them."""
    texts = each_of(locations)
    if not texts or not all(text.strip() for text in texts):
        fault = "an empty path is given" if texts else "no path is given"
        raise UserError(f"{option}: {fault}. Give a folder of {_named(suffixes)} files, or such files.")
    seen: set[tuple[int, int]] = set()
    found = []
    for text in texts:
        new: dict[tuple[int, int], Path] = {}
        for file in _files_at(text, suffixes, option):
            new.setdefault(_identity(file), file)
        files = [file for identity, file in new.items() if identity not in seen]
        if not files:
            raise UserError(f"{option}: all files of {text!r} are those of paths before it. Leave it out.")
        seen |= new.keys()
        found.append(files)
    return found


def repeated_paths(locations: Locations, suffixes: tuple[str, ...], option: str) -> int:
    """How many paths lead to files at ``locations`` to which others lead before them."""
    files = [file for text in each_of(locations) for file in _files_at(text, suffixes, option)]
    return len(files) - len(set(map(_identity, files)))


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
    if not candidates:
        _refuse_missing(location, suffixes, option)
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
    matches, named = [path] if os.path.lexists(path) else [], True
    if _is_pattern(location):
        matches = sorted(_matches(path))
        named = not set("*?[]") & set(path.suffix or "*")
    found: dict[Path, bool] = {}
    for match in matches:
        if os.path.isdir(match):
            files = sorted(entry for entry, is_folder in _below(match, saved_is_files=True) if not is_folder)
            found.update({file: found.get(file, False) for file in files})
        elif not _describes_saved(match):
            found[match] = named
    return list(found.items())


def _refuse_missing(location: str, suffixes: tuple[str, ...], option: str) -> None:
    """Raise UserError if there is nothing at ``location``, or it cannot be seen."""
    try:
        os.stat(resolve_path(location))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise UserError(
            f"{option}: {location!r} does not exist (looked in {Path.cwd()}). Give a folder of {_named(suffixes)}"
            " files, or one such file."
        ) from None
    except OSError as problem:
        raise UserError(f"{option}: {location!r} cannot be read: {problem.strerror}.") from None


def _is_pattern(location: str) -> bool:
    return bool(set("*?[") & set(location)) and not os.path.exists(resolve_path(location))


def _matches(pattern: Path) -> list[Path]:
    """The files and folders that ``pattern`` matches."""
    parts = pattern.parts
    if "**" not in parts:
        return list(map(Path, glob(str(pattern))))
    # glob follows links to folders above without an end, and says nothing of folders that cannot be read.
    first = parts.index("**")
    tops = [top for top in _matches(Path(*parts[:first])) if top.is_dir()] if first else [Path()]
    found = [(top, entry) for top in tops for entry in (top, *(entry for entry, _ in _below(top)))]
    return [entry for top, entry in found if _fits(entry.relative_to(top).parts, parts[first:])]


def _fits(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether ``pattern``, in which ``**`` stands for any number of names, matches all ``names`` of a path."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return _fits(names, pattern[1:]) or (bool(names) and _fits(names[1:], pattern))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _fits(names[1:], pattern[1:])


def other_files(locations: Locations, suffixes: tuple[str, ...]) -> Counter[str]:
    """The endings of the files at ``locations`` that ``data_files`` leaves out, with their number."""
    left_out = {
        file
        for location in each_of(locations)
        for file, is_named in _all_files(location)
        if not is_named and not file.name.lower().endswith(suffixes)
    }
    return Counter(file.suffix or file.name for file in left_out)


def named_splits(location: str, files: Sequence[Path]) -> list[str]:
    """The names of splits that ``files``, those read of a folder at ``location``, have beside `train`.

    Empty where there are none, and where ``location`` is a data set, of which one split is read. A name is the first
    word of that of a file, or of a folder in ``location``: `data/test-00000-of-00001.parquet`.
    """
    folder = resolve_path(location)
    if not folder.is_dir() or data_set_at(location) is not None:
        return []
    names = set()
    for file in files:
        words = (re.match("[a-z]*", part.lower()) for part in file.relative_to(folder).parts)
        names |= {next((word[0] for word in words if word and word[0] in _SPLITS), "")}
    return sorted(names - {"", "train"}) if "train" in names else []


_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


def _named(suffixes: tuple[str, ...]) -> str:
    return " or ".join(suffix for suffix in suffixes if not suffix.endswith(ENDINGS))


def _below(folder: Path, above: tuple[Path, ...] = (), *, saved_is_files: bool = False) -> Iterator[tuple[Path, bool]]:
    """What is in ``folder`` at any depth and not hidden, each with whether it is a folder.

    Links to folders are followed, except to one of those ``above``. With ``saved_is_files``, of a data set that
    `datasets` saved only the files with rows are in it. Raises UserError for a folder that cannot be read, and for one
    of these with several splits.
    """
    saved = saved_splits(folder) if saved_is_files else None
    if saved and len(saved) > 1:
        raise UserError(
            f"{folder} is a data set with the splits {' and '.join(saved)}. Name it by itself, with one of them:"
            f" {folder}:{next(iter(saved))}"
        )
    if saved:
        yield from ((file, False) for file in next(iter(saved.values())))
        return
    try:
        real = folder.resolve()
        entries = list(folder.iterdir()) if real not in above else []
    except OSError as problem:
        raise UserError(f"{folder}: cannot be read: {problem.strerror}") from None
    for entry in entries:
        if not entry.name.startswith("."):
            is_folder = os.path.isdir(entry)
            yield entry, is_folder
            if is_folder:
                yield from _below(entry, (*above, real), saved_is_files=saved_is_files)


def _describes_saved(file: Path) -> bool:
    """Whether ``file``, which a pattern matches, describes a data set that `datasets` saved beside it."""
    return file.name in DESCRIPTIONS and (is_saved(file.parent) or (file.parent / DICT).is_file())
