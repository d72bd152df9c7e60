"""JSON files that hold one object, such as config.json. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from panda.registry import UserError


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in ``file``. Raises UserError where the file is missing, not valid JSON, or not an object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UserError(f"{file}: cannot be read: {problem.strerror}.") from None
    except ValueError as problem:
        raise UserError(f"{file}: not valid JSON: {problem}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(content).__name__}.")
    return content
