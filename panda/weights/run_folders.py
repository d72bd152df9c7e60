"""Run directories as starting points: the export of a run stands for it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from panda.registry import UserError
from panda.weights.export_format import NEWEST
from panda.weights.export_format import read_export_format
from panda.weights.export_format import refuse_later_export

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

    Raises UserError where the run has gone on since, so that it has newer weights than its export, and where a later
    version of panda has written that.
    """
    export = folder / EXPORT
    if not (folder / PROVENANCE).exists() or not export.is_dir():
        return folder
    refuse_later_export(export)
    newest = _newest_manifest(folder)
    if newest is not None and not _is_since(newest, export):
        raise UserError(
            f"{folder}: the export of this run is older than its newest checkpoint, {newest.parent.name}."
            f" `panda export {folder}` renews it; for the older weights, name {export}."
        )
    return export


def newest_checkpoint(run: Path) -> str | None:
    """A hash of the newest checkpoint of ``run``, by which an export can be compared; None for none, or for no run."""
    manifest = _newest_manifest(run) if (run / PROVENANCE).exists() else None
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest else None


def _newest_manifest(run: Path) -> Path | None:
    found = (run / CHECKPOINTS).glob("step-*/manifest.json")
    return max(found, key=lambda file: (len(file.parent.name), file.parent.name), default=None)


def _is_since(newest: Path, export: Path) -> bool:
    """Whether ``export`` was made since the checkpoint of the manifest ``newest`` was saved."""
    if stated := read_export_format(export).get(NEWEST):
        return bool(stated == newest_checkpoint(export.parent))
    # By an earlier version, which states none: by the time. A user may edit the card at any time.
    files = [file for file in export.iterdir() if file.name != "README.md"] or [export]
    return newest.stat().st_mtime <= max(file.stat().st_mtime for file in files)
