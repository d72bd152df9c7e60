"""What samples were made of, as plain objects that a run records: engine/checkpoints/agreement.py compares two of them.

A hash says only that two runs have other data; this says which file, template or version it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

MOST_FILES = 500
"""Files of a data set that are recorded by name; of more, only their number and size."""


def origin_of(
    location: str, files: Sequence[Path], hashes: Sequence[str], rows: int, made: Mapping[str, Any]
) -> dict[str, Any]:
    """The record of one data set. ``hashes``: of the content of ``files``, or none; ``made``: how samples are made."""
    listed = files if len(files) <= MOST_FILES else []
    sizes = [file.stat().st_size for file in files]
    return {
        "location": location,
        "files": [
            [str(file), size, digest[:16] if digest else None]
            for file, size, digest in zip_longest(listed, sizes[: len(listed)], hashes[: len(listed)])
        ],
        "count": len(files),
        "bytes": sum(sizes),
        "rows": rows,
        "made": dict(made),
    }


def origins_of(dataset: Any) -> list[dict[str, Any]]:
    """The records of the data sets in ``dataset``; none of one that a task makes by itself."""
    parts = getattr(dataset, "parts", None) or ([dataset.dataset] if hasattr(dataset, "dataset") else [])
    own = getattr(dataset, "origin", None)
    return [dict(own)] if own else [found for part in parts for found in origins_of(part)]
