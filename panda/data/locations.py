"""Where data is: paths, folders and patterns, and the files at them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from panda.registry import UserError
from panda.registry.location import resolve_path

Locations = str | Sequence[str]
"""Where data is: a path or a pattern, or several."""


def each_of(locations: Locations) -> tuple[str, ...]:
    """The paths and patterns that ``locations`` is."""
    return (locations,) if isinstance(locations, str) else tuple(locations)


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
    candidates = _all_files(location)
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


def _all_files(location: str) -> list[tuple[Path, bool]]:
    """The files at ``location``, sorted, each with whether ``location`` names it. One that is named has any ending.

    A pattern names what it matches if it has an ending: ``more/*.log`` does, ``more/*`` does not.
    """
    path = resolve_path(location)
    matches, named = [path], True
    if _is_pattern(location):
        matches = sorted(map(Path, glob(str(path), recursive=True)))
        named = not set("*?[]") & set(path.suffix or "*")
    found = {}
    for match in matches:
        if match.is_file():
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
    """The files that are not hidden. Links to folders are followed, except to one of those ``above``."""
    real = folder.resolve()
    for entry in folder.iterdir() if real not in above else ():
        if not entry.name.startswith("."):
            if entry.is_dir():
                yield from _files_below(entry, (*above, real))
            elif entry.is_file():
                yield entry
