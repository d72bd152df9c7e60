"""The format of an export, in a file beside its weights: which versions of panda read it. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

import panda
from panda.registry import UserError

FILE = "panda.json"
FORMAT = 1
"""Of exports that this version writes. Exports of before 0.1.0, and folders of others, do not say one."""


def write_export_format(folder: Path) -> None:
    """Say in ``folder``, an export, which format it has, and which version wrote it."""
    stated = {"format": FORMAT, "written_by": panda.__version__}
    (folder / FILE).write_text(json.dumps(stated) + "\n", encoding="utf-8")


def refuse_later_export(folder: Path) -> None:
    """Raise UserError where a later version of panda has written the export in ``folder``, in another format."""
    try:
        stated = json.loads((folder / FILE).read_text(encoding="utf-8"))["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if isinstance(stated, int) and stated > FORMAT:
        raise UserError(
            f"{folder}: it was exported by a later version of panda, in format {stated}, and this one reads up to"
            f" {FORMAT}. Install that version; plain transformers reads it, too."
        )
