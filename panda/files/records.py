"""Reading files of one JSON object a line, each with its ``step``."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from panda.files.terminal import number_of


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in ``path``, in order; none where there is no file. A line that is no record is left out.

    The last may have been cut off; others are reported.
    """
    records, damaged = _read(path)
    if damaged:
        others = f" and {number_of(len(damaged) - 1, 'more line')}" if len(damaged) > 1 else ""
        _say(f"note: {path}:{damaged[0]}{others}: damaged, and left out.")
    return records


@cache
def _say(note: str) -> None:
    """Print ``note`` once: a command may read a file several times."""
    print(note, file=sys.stderr, flush=True)


def damaged_lines(path: Path) -> list[int]:
    """The numbers of the lines of ``path`` that ``read_records`` reports, counted from 1."""
    return _read(path)[1]


def _read(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    records: list[dict[str, Any]] = []
    damaged = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            damaged.append(number)
    return records, damaged


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        fits = _fits(record)
    except (ValueError, RecursionError):
        return None
    if not fits:
        return None
    if not isinstance(record, dict) or not isinstance(step := record.get("step"), int) or isinstance(step, bool):
        return None
    numbers = (record.get(key) for key in ("loss", "learning_rate", "eval_loss") if key in record)
    is_plain = all(each is None or (isinstance(each, (int, float)) and not isinstance(each, bool)) for each in numbers)
    has_rate = "loss" not in record or record.get("learning_rate") is not None
    return record if is_plain and has_rate else None


def _fits(value: Any) -> bool:
    """Whether each integer in ``value`` has at most 64 bits: a larger one cannot be shown as a number."""
    if isinstance(value, dict):
        return all(map(_fits, value.values()))
    if isinstance(value, list):
        return all(map(_fits, value))
    return not isinstance(value, int) or -(2**63) <= value < 2**63
