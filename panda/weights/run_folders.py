"""Run directories as starting points: the export of a run stands for it."""

from __future__ import annotations

from pathlib import Path

from panda.registry import UserError

PROVENANCE = "provenance.json"
"""The file that makes a folder a run directory."""

RUN_CONFIG = "config.yaml"
"""The file in it that has the whole configuration."""

METRICS = "metrics.jsonl"
"""The file in it that has the records of the log and of evaluations."""

CHECKPOINTS = "checkpoints"
"""The folder in it that holds checkpoints."""

EXPORT = "export"
"""The folder of a run directory that holds the trained model."""

CARD_MARK = "<!-- Written by panda, which replaces it with the next export. Without this line it is left as it is. -->"
"""The line by which panda knows a card that it wrote."""

LOG = "log.txt"
"""What libraries have warned of."""


def exported_model(folder: Path) -> Path:
    """The export in ``folder`` if that is a run directory that has one, else ``folder`` itself.

    Raises UserError where the run has gone on since: its export has older weights than its newest checkpoint.
    """
    export = folder / EXPORT
    if not (folder / PROVENANCE).exists() or not export.is_dir():
        return folder
    # A user may edit the card at any time.
    files = [file for file in export.iterdir() if file.name != "README.md"] or [export]
    written = max(file.stat().st_mtime for file in files)
    checkpoints = sorted((folder / "checkpoints").glob("step-*/manifest.json"))
    if checkpoints and checkpoints[-1].stat().st_mtime > written:
        raise UserError(
            f"{folder}: the export of this run is older than its newest checkpoint, {checkpoints[-1].parent.name}."
            f" `panda export {folder}` renews it; for the older weights, name {export}."
        )
    return export
