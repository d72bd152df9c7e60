"""The hooks: when panda calls them around a run, on which ranks, and with which arguments.

A lifecycle plugin implements any of them with ``@hookimpl``, under exactly these names and with any
subset of these arguments. They are coarse moments, never a layer or a micro batch, so they cost
almost nothing. Unless a hook says otherwise it is called on every rank, its return value is
ignored, and an exception in it ends the run. A hook that is called on every rank may use
collectives; one that is called on rank 0 only must not.

A plugin of ``panda.plugins`` runs where ``plugins:`` names it. Hooks in the module of any other
component are live in the runs that chose any component of that module. Of several implementations
the one registered last is called first, as pluggy has it; ``@hookimpl(tryfirst=True)`` and
``trylast=True`` change that.

``run`` is the ``panda.runner.Run`` in progress.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import pluggy

if TYPE_CHECKING:
    from panda.runner import Run

hookspec = pluggy.HookspecMarker("panda")
hookimpl = pluggy.HookimplMarker("panda")


# -- the run ----------------------------------------------------------------------------------


@hookspec
def panda_run_start(run: Run) -> None:
    """Everything is built and, where the run resumes, loaded; no step has been taken."""


@hookspec
def panda_run_end(run: Run) -> None:
    """The last step is done, the final checkpoint and the export are on disk."""


@hookspec
def panda_exception(run: Run, error: BaseException) -> None:
    """``error`` ends the run. Called on the ranks that see it, in place of ``panda_run_end``.

    Not a place for collectives: other ranks may be stuck or gone.
    """


# -- training ---------------------------------------------------------------------------------


@hookspec
def panda_epoch_end(run: Run, epoch: int) -> None:
    """The last sample of epoch ``epoch`` (counted from 0) was in the step that has just ended."""


@hookspec
def panda_step_end(run: Run, step: int) -> None:
    """Optimizer step ``step`` (counted from 1) is done.

    Values are still on the device. Reading one makes the host wait: do not, here.
    """


@hookspec
def panda_log(run: Run, record: dict[str, Any]) -> None:
    """A log record of plain numbers, every ``logging_steps`` steps. **Rank 0 only.**

    Keys: ``step``; ``loss``, per supervised token, the mean over the whole step of the last step;
    ``router_loss``, without its weight, where a mixture of experts is trained with one;
    ``learning_rate``; ``grad_norm``, before clipping; ``tokens`` and ``supervised_tokens``, since the
    run began and over all ranks; ``skipped_steps``, of all steps those that changed nothing because
    their gradients were not finite; ``tokens_per_second``, ``step_seconds`` and ``data_wait``, the
    share of the time that rank 0 waited for batches, each the mean since the last record, without the
    time that saving took. On a GPU ``memory_gib``, the most that torch had allocated on rank 0's GPU
    since the last record. In 16 bits, on a card whose speed is known, ``mfu``: the operations of the
    forward and backward passes a second, as a share of the bf16 peak of all cards. A token takes 6 for
    each weight that is trained and 4 for a frozen one (without the embedding, and of experts for those
    that a token uses), and 12 x layers x width x mean length of a sample for attention; padding and what
    is recomputed do not count. In addition ``_min``, ``_median`` and ``_max`` of each quantity that the
    optimizer reports of each parameter (``trust_ratio`` of nvlamb); all of them are in
    ``run.observations``.
    """


@hookspec
def panda_evaluation(run: Run, record: dict[str, Any]) -> None:
    """The run was evaluated on ``eval_data_dir``, every ``eval_steps`` steps and at the end. **Rank 0 only.**

    ``record`` has ``step``; ``eval_loss``, per supervised token, each sample counted once over all
    ranks; ``eval_tokens`` and ``eval_supervised_tokens``; ``eval_seconds``.
    """


# -- files ------------------------------------------------------------------------------------


@hookspec
def panda_checkpoint_saved(run: Run, path: Path) -> None:
    """The checkpoint at ``path`` is complete on disk and ``latest`` points at it."""
