"""JSON files that hold one object, such as config.json. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panda.registry import UserError
from panda.weights.git_lfs import pointer_problem

_TAG = "__float__"
_SPECIAL = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
"""Numbers that JSON lacks, as transformers 5 writes them: `{"__float__": "Infinity"}`."""


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in ``file``, in which numbers that JSON lacks may be written as Python or transformers 5 does.

    Raises UserError where the file is missing, not valid JSON, or not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_hook=special_float)
    except OSError as problem:
        raise UserError(f"{file}: cannot be read: {problem.strerror}.") from None
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{file}: {pointer_problem(file) or f'not valid JSON: {problem}.'}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(content).__name__}.")
    return content


def write_json_object(file: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` to ``file``. Infinity is written as Python writes it: 4.57 of transformers reads no tags."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def special_float(value: dict[str, Any]) -> Any:
    """The number for which transformers 5 wrote the JSON object ``value``; ``value`` itself where it is any other."""
    if value.keys() == {_TAG} and isinstance(value[_TAG], str):
        return _SPECIAL.get(value[_TAG], value)
    return value
