"""What tests say about runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Train = Callable[..., str]
"""The fixture ``train``: ``train(directory, *flags, ranks=1, fails=False, **options)`` returns what was printed."""


def rows_file(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """``rows`` as a file in a new ``folder``."""
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
