"""Files of one JSON object a line, each with its ``step``, which are written as soon as they are known."""

from __future__ import annotations

import json
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any

from panda.files.records import read_records as read_records
from panda.files.whole import write_whole


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
