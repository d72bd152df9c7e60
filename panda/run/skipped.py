"""Runs whose last steps were skipped: when that is an error, what it says, and what helps."""

from __future__ import annotations

from pathlib import Path

import torch

from panda.configuration.user_code import flags_of_files
from panda.engine.checkpoints.folders import complete_checkpoints
from panda.engine.checkpoints.folders import step_of
from panda.registry import UserError
from panda.run.cards import has_bf16
from panda.run.interruption import how_to_continue
from panda.run.state import Run
from panda.weights.run_folders import CHECKPOINTS

SEARCHING = 20
"""Steps that fp16 may skip in a row to find its loss scale; it tries a larger one from time to time, too."""
LOWER = 0.5
"""Of the learning rate, what is proposed in its place."""


class SkippedError(UserError):
    """A run ends on skipped steps."""

    says_how_to_go_on = True


def too_many(run: Run) -> SkippedError:
    """The error of ``run``, which has skipped as many steps in a row as it may."""
    return SkippedError(
        f"step {run.step}: the last {run.skipped_in_a_row} steps were skipped, since their loss or gradients"
        f" were not finite{_or_judged(run)}. {_what_helps(run)}"
    )


def ends_on_skipped(run: Run) -> bool:
    """Whether the last steps were skipped, by more than fp16 skips to find its loss scale."""
    skipped, loss = run.skipped_in_a_row, run.loss
    if not skipped or run.options.precision != "fp16":
        return skipped > 0
    return skipped >= SEARCHING or (loss is not None and not bool(torch.isfinite(loss)))


def ended_on_skipped(run: Run) -> SkippedError:
    """The error of ``run``, whose last steps were skipped."""
    last = "step was" if run.skipped_in_a_row == 1 else f"{run.skipped_in_a_row} steps were"
    return SkippedError(
        f"the run ends on skipped steps: of {run.step:,} the last {last} skipped, since loss or gradients were"
        f" not finite{_or_judged(run)}. So nothing is exported. {_what_helps(run)}"
    )


def _or_judged(run: Run) -> str:
    return ", or since a plugin had them skipped" if run.hooks.has("panda_gradients") else ""


def _what_helps(run: Run) -> str:
    """Where the last good weights are, and what to change before training goes on."""
    files = flags_of_files(run.resolved)
    can_change = run.options.precision == "fp16" and has_bf16(run.processes.device)
    other = ", or write `precision: bf16` in place of fp16" if can_change else ""
    change = (
        f"`panda replay {run.directory} {run.step}{files}` finds the rows. Mend the data, or lower"
        f" `learning_rate`{other}"
    )
    newest, before = run.newest_checkpoint, _before(run)
    if newest is None:
        return f"No checkpoint was saved. {change}, and start again."
    good = f"The last good weights are in {newest}: `panda export {newest} --output FOLDER`. {change}"
    if before is None:
        return f"{good}, and start again: no checkpoint from before these steps is left."
    flags = f" --learning_rate {run.options.learning_rate * LOWER:g}{files}"
    line = how_to_continue(run.directory, before, flags, exactly=True)
    return f"{good}: continued unchanged, the run takes the same steps and ends in the same way.\n{line}"


def _before(run: Run) -> Path | None:
    """The newest checkpoint from before the steps that were skipped last."""
    saved = [*complete_checkpoints(run.directory / CHECKPOINTS), *filter(None, [run.resumed_from])]
    before = [path for path in saved if path.exists() and step_of(path) <= run.step - run.skipped_in_a_row]
    return max(before, key=step_of, default=None)
