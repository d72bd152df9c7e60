"""Whether the disk has room for what a run is going to write."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panda.configuration.options import RunOptions
from panda.data.order import BatchPlan
from panda.files.terminal import number_of
from panda.registry import UserError
from panda.registry.resolve import Resolved
from panda.run.estimate import state_bytes

_WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a weight in the forward pass."""


_SMALL, _OF_A_RANK = 100_000, 16_000
"""About the bytes of the small files of a run and its export, and of a rank's random states in a checkpoint."""


@dataclass(frozen=True)
class DiskNeeds:
    """Bytes that a run is going to write, about."""

    checkpoint: int
    """Of one; 0 where none is saved."""
    export: int
    lasting: int
    """How many checkpoints are kept, with those of `save_steps` and that at the end."""
    saves: int
    """How many are written, without those of `save_minutes`: each before an older one is removed."""
    small: int = 0
    """Of the other files: descriptions of the run and its export, with a tokenizer in each, and the log."""

    @property
    def least(self) -> int:
        """Without which the run cannot end, also where it keeps one checkpoint only."""
        return self.small + max(min(self.saves, 2) * self.checkpoint, self.checkpoint + self.export)

    @property
    def most(self) -> int:
        """At the moment that needs most: the last save, or the export."""
        at_once = min(self.saves, self.lasting + 1)
        return self.small + max(at_once * self.checkpoint, self.lasting * self.checkpoint + self.export)


def disk_needs(resolved: Resolved, parameters: int, trained: int, plan: BatchPlan, tokenizer: Any) -> DiskNeeds:
    """What the run of ``resolved`` is going to write, from where ``plan`` starts.

    ``parameters``: of the model, without its adapters; ``trained``: with them.
    """
    options: RunOptions = resolved.core
    width = _WIDTHS[options.precision]
    masters = 0 if options.precision == "fp32" and options.zero == 0 else 4
    # ZeRO-3 writes the weights as masters only.
    each = (width if options.zero < 3 else 0) + masters + state_bytes(resolved)
    steps = options.save_steps
    by_steps = plan.total_steps // steps - plan.start_step // steps if steps else 0
    at_end = options.save_final and not (steps and plan.total_steps % steps == 0)
    saves = by_steps + at_end
    lasting = min(saves, options.save_total_limit or saves)
    checkpoint = round(trained * each) + plan.ranks * _OF_A_RANK if saves or options.save_minutes else 0
    export = trained * 4 if options.use_lora else parameters * width
    backend = getattr(tokenizer, "backend_tokenizer", None)
    written = len(backend.to_str().encode()) if backend else 0
    return DiskNeeds(checkpoint, export, lasting, saves, _SMALL + 2 * written)


def check_disk(directory: Path, needs: DiskNeeds) -> str | None:
    """A note where there is room for fewer checkpoints than the run keeps; None where there is enough.

    ``directory`` need not exist. Raises UserError where there is no room for one of them, and the export.
    """
    free = shutil.disk_usage(next(folder for folder in (directory, *directory.parents) if folder.exists())).free
    if free < needs.least:
        one = f"a checkpoint takes about {_gb(needs.checkpoint)}, " if needs.checkpoint else ""
        two = "each before the last one is removed, " if one and needs.saves > 1 else ""
        raise UserError(
            f"output_dir: {directory} has room for {_gb(free)}, and the run takes {_gb(needs.least)}: {one}{two}the"
            f" export about {_gb(needs.export)}, and other files {_gb(needs.small)}. Make room, or choose another"
            " `output_dir`. With `save_final: false`, `save_minutes: 0` and no `save_steps` only the export is written."
        )
    if free < needs.most:
        return (
            f"note: {directory} has room for {_gb(free)}, and the run keeps {number_of(needs.lasting, 'checkpoint')} of"
            f" about {_gb(needs.checkpoint)} each, for which it takes {_gb(needs.most)}: `save_total_limit` keeps fewer"
        )
    return None


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
