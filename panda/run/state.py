"""A run in progress, as hooks see it."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from dataclasses import field
from numbers import Real
from pathlib import Path
from typing import Any
from typing import TypeVar

import torch

from panda.configuration.options import RunOptions
from panda.data.batches import Batch
from panda.data.batches import RowShape
from panda.data.order import BatchPlan
from panda.data.packing import Layout
from panda.data.token_dataset import Sample
from panda.data.token_dataset import SampleSet
from panda.engine.engine import Engine
from panda.engine.evaluated_weights import evaluated_weights
from panda.engine.evaluated_weights import evaluates_others
from panda.engine.processes import Processes
from panda.engine.weights_copy import WeightsCopy
from panda.engine.weights_copy import copy_weights
from panda.engine.weights_copy import using
from panda.models.forward.stretched_positions import needs_positions
from panda.models.forward.varlen_attention import takes_bounds
from panda.optim.schedules import Schedule
from panda.registry import UserError
from panda.registry.hooks import Hooks
from panda.registry.hooks import caller
from panda.registry.resolve import Resolved
from panda.run.asking import Added
from panda.run.asking import Asking
from panda.run.asking import Stop
from panda.run.asking import product
from panda.run.directory_lock import RunLock
from panda.tasks.task import Task
from panda.weights.generation_config import Decoding


@dataclass
class Run:
    """A run in progress, which hooks are given. docs/plugins.md lists the attributes that they may rely on."""

    resolved: Resolved
    """The configuration."""
    directory: Path
    """The run directory."""
    processes: Processes
    """This rank, how many there are, and the device."""
    task: Task
    dataset: SampleSet
    layout: Layout
    """The rows of each step."""
    evaluations: dict[str, Layout]
    """The rows of the held-out data, by the name of their set; that of the only one is empty."""
    schedule: Schedule
    """Maps the number of completed optimizer steps to a factor of the peak learning rate."""
    engine: Engine
    hooks: Hooks
    """The live hooks."""
    agreement: dict[str, Any]
    """The facts that must be the same in a run that continues this one."""
    decoding: Decoding
    """How its answers are decoded, and where they end: what the export says too."""
    reference: Any = None
    """The frozen model that the task asked for, called like the model; None for none."""
    generate: Any = None
    """Continues prompts with the model that is trained: a ``panda.tasks.task.Generate``."""
    resumed_from: Path | None = None
    """The checkpoint that the run continues from."""
    step: int = 0
    """Optimizer steps done."""
    begun: float = field(default_factory=time.perf_counter)
    """When this start of the run began, by ``time.perf_counter``."""
    applied: bool = True
    """Whether the last step changed the weights: not one that was left out or skipped."""
    loss: torch.Tensor | None = None
    """The loss of the last step per unit, over all ranks, on the device; None where it was left out."""
    grad_norm: torch.Tensor | float | None = None
    """The norm of its gradients before clipping, on the device; not finite where they were not. None as of ``loss``."""
    skipped_in_a_row: int = 0
    """Of the last steps, those that were skipped."""
    most_skipped: int = 50
    """Skipped steps in a row that end the run with an error; fp16 may need some twenty to find its loss scale."""
    learning_rate_factor: float = 1.0
    """By what hooks have scaled the learning rate, besides the schedule."""
    stopped: Stop | None = None
    """Who had the run end before its last step, and why; None where it has not been stopped."""
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds since this start of the run: ``save_seconds`` and, in one that was resumed, ``resume_seconds``."""
    checkpoints: list[Path] = field(default_factory=list)
    """Checkpoints that this process has saved."""
    observations: dict[str, dict[str, float]] = field(default_factory=dict)
    """On rank 0, as of the last log record: what the optimizer reports of each parameter, by quantity and name."""
    flops_per_token: float | None = None
    """On rank 0 on a GPU: operations of a forward and backward pass for a token, without what is recomputed."""
    evaluation_is_recorded: bool = False
    """On rank 0, in ``panda_evaluation``: whether metrics.jsonl has this evaluation of an earlier start."""
    answers: list[dict[str, str]] = field(default_factory=list)
    """At the end of the run: ``prompt`` and ``answer`` for each prompt."""

    lock: RunLock = field(default_factory=RunLock, repr=False)
    """Of the run directory."""
    make_again: Callable[[], Path] | None = field(default=None, repr=False)
    """On rank 0: makes the run directory again, with its description, if it was removed, and returns it."""
    asking: Asking = field(default_factory=Asking, repr=False)
    """What hooks ask for."""
    added: dict[str, Added] = field(default_factory=dict, repr=False)
    """On rank 0: what hooks add to the next record, by name."""
    higher_is_better: set[str] = field(default_factory=set, repr=False)
    """Names of entries of evaluations of which a higher one is the better, as far as metrics and hooks have said so."""
    unsaved: list[Exception] = field(default_factory=list, repr=False)
    """Why plugins have no state in the checkpoint that is being written, on this rank."""
    kept: dict[int, set[str]] = field(default_factory=dict, repr=False)
    """Steps whose checkpoints ``save_total_limit`` does not remove, and who keeps each."""
    frozen: dict[str, set[str]] = field(default_factory=dict, repr=False)
    """Parameters that are frozen, and who keeps each so."""
    save_is_due: bool = False
    """Whether a hook has asked for a checkpoint of this step."""
    left_out: str | None = None
    """Who has the step left out that comes next, or skipped that is under way, and why."""
    evaluated_weights: tuple[str, WeightsCopy] | None = None
    """Who gave other weights to evaluate and to export, and these; None where they are the trained ones."""

    @property
    def collate(self) -> Callable[..., Batch]:
        """The task's ``collate``; an exception names the package of the task, out of a worker, too."""
        task, collate = self.resolved.components["task"], self.task.collate

        def attributed(rows: list[list[Sample]], shape: RowShape) -> Batch:
            with task.attributed("`collate`"):
                found = collate(rows, shape)
            if not isinstance(found, Batch):
                raise UserError(
                    f"task: `collate` returned a {type(found).__qualname__}, and not a `Batch` of panda.data.batches."
                    f" This is a fault of {task.offer.describe()}."
                )
            return found

        return attributed

    @property
    def told_of_rows(self) -> dict[str, bool]:
        """Whether batches carry positions and the bounds of samples, by what the model and the frozen one need.

        Arguments of ``step_batches``.
        """
        models = [self.engine.module] + ([] if self.reference is None else [self.reference.module])
        return {"positions": any(map(needs_positions, models)), "bounds": takes_bounds(self.engine.module)}

    # -- what hooks may ask for

    def stop(self, reason: str) -> None:
        """End the run after the step that is under way: it is evaluated, saved and exported, and says ``reason``.

        In any hook that is called on every rank while the run trains; on one rank is enough.
        """
        self.asking.asked.stop[self.asking.allowed("stop").label] = reason

    def skip_step(self, reason: str) -> None:
        """Leave out the step that comes next, in ``panda_step_start``; on one rank is enough.

        Weights, optimizer and random numbers stay as they are; data and schedule go on. It is counted and printed. In
        ``panda_gradients`` the step that is under way is skipped, as one whose gradients are not finite is.
        """
        moments = ("panda_step_start", "panda_gradients")
        self.asking.asked.skip[self.asking.allowed("skip_step", moments).label] = reason

    def scale_learning_rate(self, factor: float) -> None:
        """Multiply the learning rate of all steps that are still to come by ``factor``, besides the schedule.

        On one rank is enough, and on several with the same factor it is done once. Checkpoints keep it.
        """
        who, rates = self.asking.allowed("scale_learning_rate").label, self.asking.asked.rate
        if not 0 <= factor < float("inf"):
            raise UserError(f"{who} scales the learning rate by {factor}; expected a finite number from 0 on.")
        rates[who] = rates.get(who, 1.0) * factor

    def save_checkpoint(self) -> None:
        """Write a checkpoint when this step ends, after its evaluation; on one rank is enough."""
        self.asking.asked.save[self.asking.allowed("save_checkpoint").label] = True

    # -- what hooks may do, on every rank alike

    def log(self, name: str, value: float | torch.Tensor, *, higher_is_better: bool = False) -> None:
        """Add ``value`` to the next record of the log; in ``panda_evaluation_start``, to that of the evaluation.

        A number, or a tensor of one element on any device, which is read when the record is made. Rank 0's counts.
        ``higher_is_better``: what `best_metric` and the like take it for, in an evaluation; the same on all ranks.
        """
        moments = ("panda_step_start", "panda_step_end", "panda_evaluation_start")
        called = self.asking.called("log", moments)
        before = self.added.get(name)
        if before is not None and before.by != called.label:
            raise UserError(f"{called.label} and {before.by} both add {name!r} to a record. One has to rename it.")
        if not isinstance(value, Real) and not (torch.is_tensor(value) and value.numel() == 1):
            raise UserError(f"{called.label}: run.log({name!r}, ...) takes a number, not {type(value).__qualname__}.")
        if higher_is_better:
            self.higher_is_better.add(f"eval_{name}")
        if self.processes.rank == 0:
            self.added[name] = Added(called.label, value.detach() if torch.is_tensor(value) else value)

    def keep_checkpoint(self, step: int) -> None:
        """Do not remove the checkpoint of ``step``, whatever ``save_total_limit`` says."""
        _hold(self.kept, step)

    def release_checkpoint(self, step: int) -> None:
        """Let ``save_total_limit`` remove the checkpoint of ``step`` again, unless another plugin keeps it."""
        _release(self.kept, step)

    @property
    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that there is: all were saved after steps that changed the weights."""
        kept = [path for path in (self.resumed_from, *self.checkpoints) if path is not None and path.exists()]
        return kept[-1] if kept else None

    def weights_copy(self) -> WeightsCopy:
        """A copy of the weights that are trained, as each rank holds them: its part of the fp32 master weights."""
        return copy_weights(self.engine)

    def evaluate_with(self, weights: WeightsCopy) -> None:
        """Evaluate, answer and export with ``weights`` from now on, and go on training and saving the others."""
        called = self.asking.called("evaluate_with")
        if evaluates_others(self.engine):
            raise UserError(
                f"{called.label} and {self.resolved.components['optimizer'].label} both give weights to evaluate. Leave"
                " the plugin out, or take `optimizer: adamw`."
            )
        if self.evaluated_weights is not None and self.evaluated_weights[0] != called.label:
            raise UserError(
                f"{called.label} and {self.evaluated_weights[0]} both give weights to evaluate. Leave one of them out."
            )
        self.evaluated_weights = (called.label, weights)

    def using_evaluated_weights(self) -> AbstractContextManager[None]:
        """In the meantime the model has the weights that it is evaluated with. Every rank has to open it."""
        if self.evaluated_weights is None:
            return evaluated_weights(self.engine)  # of an optimizer that trains with others
        return using(self.engine, self.evaluated_weights[1])

    def freeze(self, patterns: Sequence[str]) -> list[str]:
        """Keep the trained parameters whose names match ``patterns`` as they are, and return their names.

        Their gradients are zero, also in the norm, and they do not decay. It saves neither memory nor time.
        """
        names = self.engine.freezing.matching(patterns)
        self.engine.freezing.freeze(names)
        for name in names:
            _hold(self.frozen, name)
        return names

    def unfreeze(self, patterns: Sequence[str]) -> list[str]:
        """Train the parameters whose names match ``patterns`` again, unless another plugin keeps them frozen.

        Returns the names of those that are trained now.
        """
        names = self.engine.freezing.matching(patterns)
        for name in names:
            _release(self.frozen, name)
        trained = [name for name in names if name not in self.frozen]
        self.engine.freezing.unfreeze(trained)
        return trained

    # -- what the loop does

    def at(self, moment: str, **given: Any) -> None:
        """Call the hook ``moment`` on every rank, and do what its implementations ask for, on any of them."""
        with self.asking.at(moment):
            getattr(self.hook, moment)(run=self, **given)
        if not self.hooks.acts(moment):
            return
        asked = self.asking.agreed(self.processes)
        if not asked:
            return
        if asked.stop and self.stopped is None:
            self.stopped = Stop(*next(iter(asked.stop.items())))
        if asked.skip:
            self.left_out = "; ".join(f"{who}: {reason}" for who, reason in asked.skip.items())
        self.learning_rate_factor *= product(asked.rate)
        self.save_is_due |= bool(asked.save)

    @property
    def held_out(self) -> dict[str, str]:
        """The fingerprint of each set of held-out data, by its name: losses on others are not compared with these."""
        return {name: layout.dataset.fingerprint for name, layout in self.evaluations.items()}

    @property
    def hook(self) -> Any:
        """pluggy's caller: ``run.hook.panda_log(run=run, record=...)``."""
        return self.hooks.call

    @property
    def plan(self) -> BatchPlan:
        """How the data is cut into steps; ``plan.total_steps`` is the length of the run."""
        return self.layout.plan

    @property
    def options(self) -> RunOptions:
        """The options of every run."""
        options: RunOptions = self.resolved.core
        return options


Held = TypeVar("Held")


def _hold(held: dict[Held, set[str]], what: Held) -> None:
    """Note in ``held`` that whose hook is being called holds ``what``."""
    held.setdefault(what, set()).add(_who())


def _release(held: dict[Held, set[str]], what: Held) -> None:
    """Note that whose hook is being called holds ``what`` no longer: it is gone from ``held`` if nobody else does."""
    held.get(what, set()).discard(_who())
    if not held.get(what):
        held.pop(what, None)


def _who() -> str:
    called = caller()
    return called.label if called else ""
