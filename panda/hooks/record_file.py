"""Files of one JSON object a line, each with its ``step``, which are written as soon as they are known."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any

from panda.files.whole import write_whole


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in ``path``, in order; none where there is no file. A line that is no record is left out.

    The last may have been cut off; others are reported.
    """
    records: list[dict[str, Any]] = []
    damaged = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            damaged.append(number)
    if damaged:
        others = f" and {len(damaged) - 1} more lines" if len(damaged) > 1 else ""
        print(f"note: {path}:{damaged[0]}{others}: damaged, and left out.", file=sys.stderr, flush=True)
    return records


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(step := record.get("step"), int) or isinstance(step, bool):
        return None
    numbers = (record.get(key) for key in ("loss", "learning_rate", "eval_loss") if key in record)
    is_plain = all(each is None or (isinstance(each, (int, float)) and not isinstance(each, bool)) for each in numbers)
    has_rate = "loss" not in record or record.get("learning_rate") is not None
    return record if is_plain and has_rate else None


class RecordFile:
    """A file that records are written to."""

    def __init__(self, path: Path, step: int) -> None:
        """Continue ``path`` after ``step``. Records of later steps, which an interrupted run wrote, are removed."""
        kept = [record for record in read_records(path) if record["step"] <= step]
        write_whole(path, "".join(map(_line, kept)))  # whenever the process is killed, no record is lost
        self.path = path
        self.stream = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        try:
            self.stream.write(_line(record))
            self.stream.flush()
        except OSError as problem:  # which does not name the file
            with suppress(OSError):
                self.stream.close()
            raise OSError(problem.errno, problem.strerror, str(self.path)) from None

    def close(self) -> None:
        self.stream.close()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """``value`` with null in place of NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value
