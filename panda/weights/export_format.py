"""What an export says of itself, in a file beside its weights: its format, and how far its run was. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import panda
from panda.registry import UserError

FILE = "panda.json"
NEWEST = "newest_checkpoint"
"""The key for the hash of the newest checkpoint of the run."""
FILES = "files"
"""The key for the names of the export's files. Any other file in the folder is not panda's to replace."""
FORMAT = 1
"""Of exports that this version writes. Exports of before 0.1.0, and folders of others, do not say one."""


def write_export_format(folder: Path, newest: str | None) -> None:
    """Say in ``folder``, an export, which format it has, and which version wrote it.

    ``newest``: the hash of the newest checkpoint that its run had then; None for none, or where it is of no run.
    """
    stated = {"format": FORMAT, "written_by": panda.__version__} | ({NEWEST: newest} if newest else {})
    stated[FILES] = sorted(path.name for path in folder.iterdir())
    (folder / FILE).write_text(json.dumps(stated) + "\n", encoding="utf-8")


def refuse_later_export(folder: Path) -> None:
    """Raise UserError where a later version of panda has written the export in ``folder``, in another format."""
    stated = read_export_format(folder).get("format")
    if isinstance(stated, int) and stated > FORMAT:
        raise UserError(
            f"{folder}: it was exported by a later version of panda, in format {stated}, and this one reads up to"
            f" {FORMAT}. Install that version; plain transformers reads it, too."
        )


def read_export_format(folder: Path) -> dict[str, Any]:
    """What the export in ``folder`` says of itself; empty where it says nothing, or that is damaged."""
    try:
        stated = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return stated if isinstance(stated, dict) else {}
