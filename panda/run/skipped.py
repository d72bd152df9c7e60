"""Runs whose last steps were skipped: when that is an error, and what it says."""

from __future__ import annotations

import torch

from panda.run.state import Run

SEARCHING = 20
"""Steps that fp16 may skip in a row to find its loss scale; it tries a larger one from time to time, too."""


def too_many(run: Run) -> str:
    """The error of ``run``, which has skipped as many steps in a row as it may."""
    return (
        f"step {run.step}: the last {run.skipped_in_a_row} steps were skipped, since their loss or gradients"
        f" were not finite{_or_judged(run)}. Lower `learning_rate`, look at the data, or write `precision: bf16`"
        f" in place of fp16. {_last_good(run)}"
    )


def ends_on_skipped(run: Run) -> bool:
    """Whether the last steps were skipped, by more than fp16 skips to find its loss scale."""
    skipped, loss = run.skipped_in_a_row, run.loss
    if not skipped or run.options.precision != "fp16":
        return skipped > 0
    return skipped >= SEARCHING or (loss is not None and not bool(torch.isfinite(loss)))


def ended_on_skipped(run: Run) -> str:
    """The error of ``run``, whose last steps were skipped."""
    last = "step was" if run.skipped_in_a_row == 1 else f"{run.skipped_in_a_row} steps were"
    export = f" `panda export {run.directory}` exports it as it is." if run.newest_checkpoint else ""
    return (
        f"the run ends on skipped steps: of {run.step:,} the last {last} skipped, since loss or gradients were"
        f" not finite{_or_judged(run)}. So nothing is exported. {_last_good(run)}{export}"
    )


def _or_judged(run: Run) -> str:
    return ", or since a plugin had them skipped" if run.hooks.has("panda_gradients") else ""


def _last_good(run: Run) -> str:
    """The checkpoint that a run which skips its steps recommends."""
    kept = run.newest_checkpoint
    return f"The last good checkpoint is {kept}, which `--resume` continues." if kept else "No checkpoint was saved."
