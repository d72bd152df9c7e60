"""Which row of which file a sample is made of: one number for each sample, and FILE:ROW as text."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

UNKNOWN = 0
"""In place of a place."""
_ROW_BITS = 40


def place_code(file: int, row: int) -> int:
    """Row ``row``, counted from 1, of file ``file``, counted from 0, in one number."""
    return file << _ROW_BITS | row


def file_and_row(code: int) -> tuple[int, int]:
    """The file and the row of ``code``, as ``place_code`` was given them."""
    return code >> _ROW_BITS, code & ((1 << _ROW_BITS) - 1)


def renumbered(places: array[int], files: Sequence[int | None]) -> np.ndarray:
    """int64: ``places`` with other numbers of files, by their present one; UNKNOWN where there is none."""
    found = np.array(places, dtype=np.int64)
    if not files:
        return found
    known = found != UNKNOWN
    others = np.array([-1 if file is None else file for file in files], dtype=np.int64)
    file = others[found >> _ROW_BITS]
    codes: np.ndarray = np.where(known & (file >= 0), file << _ROW_BITS | found & ((1 << _ROW_BITS) - 1), UNKNOWN)
    return codes


def place_of(dataset: Any, index: int) -> str | None:
    """FILE:ROW of sample ``index`` of ``dataset``, the row counted from 1; None where that is not known."""
    find = getattr(dataset, "place", None)  # that of a task of a package may have none
    found = find(index) if find is not None else None
    return None if found is None else f"{found[0]}:{found[1]}"
