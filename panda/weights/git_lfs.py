"""Pointers, which git leaves in place of large files where git-lfs is not set up. Imports no torch."""

from __future__ import annotations

from pathlib import Path

_BEGIN = b"version https://git-lfs"


def pointer_problem(file: Path) -> str:
    """A sentence with what to do if ``file`` is such a pointer; empty for any other."""
    with file.open("rb") as stream:
        is_pointer = stream.read(len(_BEGIN)) == _BEGIN
    return is_pointer * (
        "this is the pointer that git leaves in place of a large file where git-lfs is not set up. Run `git lfs"
        " install`, then `git lfs pull` in that folder, to fetch the file."
    )
