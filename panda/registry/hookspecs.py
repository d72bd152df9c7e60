"""The hooks: when panda calls them around a run, on which ranks, and with which arguments.

A lifecycle plugin implements any of them with ``@hookimpl``, under exactly these names and with any
subset of these arguments. They are coarse moments, never a layer or a micro batch, so they cost
almost nothing. Unless a hook says otherwise it is called on every rank, its return value is
ignored, and an exception in it ends the run. A hook that is called on every rank may use
collectives; one that is called on rank 0 only must not.

A plugin of ``panda.plugins`` runs where ``plugins:`` names it. Hooks in the module of any other
component are live in the runs that chose any component of that module, and so are hooks that are methods of what its
factory returns: a task, a model, a reader, an optimizer. Of several implementations
the one registered last is called first, as pluggy has it; ``@hookimpl(tryfirst=True)`` and
``trylast=True`` change that.

``run`` is the ``panda.runner.Run`` in progress.

**Acting.** In a hook of training that is called on every rank, ``run.stop``, ``run.skip_step``,
``run.scale_learning_rate`` and ``run.save_checkpoint`` ask the run for something. One rank is enough: when the hook has
been called everywhere, all ranks agree on what was asked, on any of them, and do the same. That takes one small
collective, of hosts and not of GPUs, each time that such a hook is called in a run in which something implements it. A
plugin, module or class that has ``acts = False`` says that its hooks only watch: where all of them do, there is no
collective.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import pluggy

if TYPE_CHECKING:
    import torch

    from panda.data.batches import Batch
    from panda.registry.contexts import Better
    from panda.registry.resolve import Resolved
    from panda.runner import Run
    from panda.tasks.task import Task

hookspec = pluggy.HookspecMarker("panda")
hookimpl = pluggy.HookimplMarker("panda")


# -- the run ----------------------------------------------------------------------------------


@hookspec
def panda_run_start(run: Run) -> None:
    """Everything is built and, where the run resumes, loaded; no step has been taken. May act."""


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
    """The last sample of epoch ``epoch`` (counted from 0) was in the step that has just ended. May act."""


@hookspec
def panda_step_start(run: Run, step: int, batches: list[Batch]) -> None:
    """Optimizer step ``step`` (counted from 1) comes next, on ``batches``. May act.

    ``batches`` are the micro batches of this rank, on the CPU; a task that makes its samples in training has made
    them. They are the run's: read them, and change nothing. ``run.skip_step(reason)`` leaves the step out.
    """


@hookspec
def panda_gradients(run: Run, step: int, loss: torch.Tensor, grad_norm: torch.Tensor | float) -> None:
    """The gradients of ``step`` are known and finite, and no weight has changed yet. May act.

    ``loss``, a scalar, is that of the step per unit, and ``grad_norm`` the norm of its gradients before clipping, both
    over all ranks and on the device: to read one makes the host wait, once more a step. ``run.skip_step(reason)`` skips
    the step, on all ranks and under every ZeRO stage. A run in which nothing has this hook pays nothing for it.
    """


@hookspec
def panda_step_end(run: Run, step: int) -> None:
    """Optimizer step ``step`` (counted from 1) is done. May act.

    ``run.applied`` says whether it changed the weights: not where it was left out or skipped. ``run.loss`` and
    ``run.grad_norm`` are those of the step, None where it was left out. Values are still on the device. Reading one
    makes the host wait: do not, here. ``run.log(name, value)`` takes such a value, and it is read when a record is
    made.
    """


@hookspec
def panda_log(run: Run, record: dict[str, Any]) -> None:
    """A log record of plain numbers, every ``logging_steps`` steps. **Rank 0 only.**

    Keys: ``step``; ``loss``, per supervised token, the mean over the whole step of the last step; ``router_loss``,
    without its weight, where a mixture of experts is trained with one; ``learning_rate``; ``grad_norm``, before
    clipping; ``tokens`` and ``supervised_tokens``, since the run began and over all ranks; ``skipped_steps``, of all
    steps those that changed nothing because their loss or gradients were not finite, or a hook had them skipped;
    ``left_out_steps``, where there are any, of all steps those that a hook had left out; ``tokens_per_second``,
    ``step_seconds`` and ``data_wait``, the share of the time that rank 0 waited for batches, each the mean since the
    last record, without the time that saving took; ``save_seconds``, in the record after a checkpoint, and
    ``resume_seconds``, in the first one of a run that was resumed. On a GPU ``memory_gib``, the most that torch had
    allocated on rank 0's GPU since the last record. In 16 bits, on a card whose speed is known, ``mfu``: the operations
    of the forward and backward passes a second, as a share of the bf16 peak of all cards. A token takes 6 for each
    weight that is trained and 4 for a frozen one (without the embedding, and of experts for those that a token uses),
    and 12 x layers x width x mean length of a sample for attention; padding and what is recomputed do not count. In
    addition ``_min``, ``_median`` and ``_max`` of each quantity that the optimizer reports of each parameter
    (``trust_ratio`` of nvlamb); all of them are in ``run.observations``. Then the metrics of the task, and what hooks
    have added by ``run.log``. A step that was left out has no record.
    """


@hookspec
def panda_evaluation_metrics(resolved: Resolved, task: Task) -> Mapping[str, Better] | None:
    """The run is being prepared, and its data is not read yet: what will ``run.log`` add to evaluations?

    Returns the names, without ``eval_`` before them, each with which value is the better one: "higher", "lower", or
    None for neither. Keys such as ``best_metric`` are checked by them. None says that they are not known; so does a
    plugin that has ``panda_evaluation_start`` and lacks this hook.
    """


@hookspec
def panda_evaluation_start(run: Run) -> None:
    """The run is about to be evaluated on its held-out data. May act."""


@hookspec
def panda_evaluation(run: Run, record: dict[str, Any]) -> None:
    """The run was evaluated on its held-out data, every ``eval_steps`` steps and at the end. May act.

    ``record`` is that of rank 0 on every rank (in a run in which nothing may act, ``eval_seconds`` and what hooks add
    are each rank's own). It has ``step``; ``eval_loss``, per supervised token, each sample counted once over all ranks;
    ``eval_tokens`` and ``eval_supervised_tokens``; ``eval_seconds``; and with ``eval_`` before their names the metrics
    of the task, and what hooks have added by ``run.log`` in ``panda_evaluation_start``. What writes it to a file does
    so on rank 0, and not where ``run.evaluation_is_recorded``: a run that was killed after its last step, before it had
    exported, is evaluated once more when it goes on.
    """


# -- files ------------------------------------------------------------------------------------


@hookspec
def panda_checkpoint_saved(run: Run, path: Path) -> None:
    """The checkpoint at ``path`` is complete on disk and ``latest`` points at it. May act.

    Older ones are removed after it. Where a hook asks for a checkpoint of the step that the run goes on from, or has
    just saved, none is written, and this is called with the one that is there.
    """


# -- state ------------------------------------------------------------------------------------


@hookspec
def panda_save_state(run: Run) -> dict[str, Any]:  # type: ignore[empty-body]
    """A checkpoint is written. Returns what a run that continues it needs of this plugin, by name.

    A value is one of JSON's (None, a bool, number or text, a list, a dict whose keys are texts), a tensor, or a
    ``WeightsCopy`` (``run.weights_copy()``). Values and tensors are taken from rank 0, and given to all ranks: they
    must not depend on the rank. Of a ``WeightsCopy`` each rank writes its part. All of it is written before the
    checkpoint is called complete, without pickle. Whoever has this hook has ``panda_load_state`` as well.
    """


@hookspec
def panda_load_state(run: Run, state: dict[str, Any]) -> None:
    """The run continues a checkpoint, in which this plugin saved ``state``. Called before ``panda_run_start``.

    Tensors are on the CPU. The run may have another number of ranks: a ``WeightsCopy`` is then divided among
    these. It is not called where the checkpoint has no state of this plugin; the run says so, and also if it has state
    of a plugin that is gone.
    """
