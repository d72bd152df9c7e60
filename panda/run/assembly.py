"""From names to objects: builds the parts that a resolved configuration names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from panda.configuration.options import RunOptions
from panda.configuration.options import rate_multipliers
from panda.configuration.refusals import refuse_layout
from panda.configuration.refusals import refuse_undeclared
from panda.data.order import BatchPlan
from panda.data.order import SampleOrder
from panda.data.order import Source
from panda.data.packing import Layout
from panda.data.reading import Reader
from panda.data.token_cache import TokenCache
from panda.data.token_cache import cache_folder
from panda.data.token_dataset import SampleSet
from panda.engine.checkpoints.manifest import START
from panda.engine.checkpoints.manifest import Progress
from panda.files.terminal import number_of
from panda.optim.param_groups import param_groups
from panda.optim.parameter_kinds import describe_parameters
from panda.optim.schedules import Schedule
from panda.optim.schedules import is_factor
from panda.optim.schedules import steps_to_try
from panda.registry import UserError
from panda.registry.contexts import LRSchedulerContext
from panda.registry.contexts import OptimizerContext
from panda.registry.contexts import ReaderContext
from panda.registry.contexts import TaskContext
from panda.registry.resolve import Resolved
from panda.tasks.task import Task
from panda.weights.tokenizers import read_tokenizer
from panda.weights.tokenizers import tokenizer_folder

EVALUATED_TOGETHER = 16
"""Micro batches that each rank lays out in rows together, and holds in memory, during an evaluation."""


def load_tokenizer(location: str) -> Any:
    """The Hugging Face tokenizer at ``location``, a folder or a name on the hub. Raises UserError if there is none."""
    return read_tokenizer(tokenizer_folder(location))


def build_task(resolved: Resolved, tokenizer: Any) -> Task:
    """The task that ``resolved`` names, with its reader. Raises UserError if its data is missing."""
    reader = resolved.components["reader"]
    reader_context = ReaderContext(max_row_bytes=resolved.core.max_row_bytes)
    context = TaskContext(
        tokenizer=tokenizer,
        reader=reader.build(reader_context, Reader),
        max_seq_length=resolved.core.max_seq_length,
        reader_options=reader.options,
        reader_context=reader_context,
        token_cache=TokenCache(cache_folder(resolved.core.token_cache)),
        held_out=resolved.core.eval_data_dir,
        named=resolved.named,
    )
    task: Task = resolved.components["task"].build(context, Task)
    refuse_layout(resolved, type(task))  # again, of a factory that is no class: now it is known
    return task


def evaluation_sets(options: RunOptions) -> dict[str, list[str]]:
    """The paths of the held-out data that ``options`` name, by the name of their set; that of the only one is empty."""
    paths = options.eval_data_dir or ()
    found: dict[str, list[str]] = {}
    for name, path in zip(options.eval_names or [""] * len(paths), paths, strict=True):
        found.setdefault(name, []).append(path)
    return found


def build_evaluation_tasks(resolved: Resolved, task: Task) -> dict[str, Task]:
    """``task`` over each set of the held-out data that ``resolved`` names, by the name of the set.

    Raises UserError if that data is missing.
    """
    found = {}
    for name, paths in evaluation_sets(resolved.core).items():
        with resolved.components["task"].attributed("`reading`"):
            found[name] = task.reading(tuple(paths), "eval_data_dir")
    return found


def dataset_of(resolved: Resolved, task: Task) -> SampleSet:
    """The samples of ``task``: the task that ``resolved`` names, over training or held-out data."""
    chosen = resolved.components["task"]
    with chosen.attributed("`dataset`"):
        found = task.dataset()
    if not hasattr(found, "sources"):
        raise UserError(
            f"{chosen.component.describe()}: `dataset` returned {found!r:.60}, and not samples: return"
            f" `panda.data.token_dataset.in_memory(...)` or another data set. This is a fault of"
            f" {chosen.offer.describe()}."
        )
    return found


def lay_out(
    options: RunOptions, dataset: SampleSet, ranks: int, progress: Progress = START, *, batching: str | None = None
) -> Layout:
    """The order and the rows in which a run with ``options`` reads ``dataset``, from ``progress`` on."""
    order = SampleOrder(dataset.sources, options.seed)
    plan = BatchPlan(
        samples=order.epoch_samples,
        micro_batch=options.per_gpu_train_batch_size,
        accumulation=options.gradient_accumulation_steps,
        ranks=ranks,
        epochs=options.num_train_epochs,
        max_steps=options.max_steps,
        start_step=progress.step,
        start_position=progress.position,
    )
    return _layout(options, dataset, order, plan, batching or options.batching)


def lay_out_evaluation(options: RunOptions, dataset: SampleSet, ranks: int) -> Layout:
    """The rows in which an evaluation reads ``dataset``: each sample once, and as many micro batches on every rank.

    Rows are packed if the run's are, and otherwise grouped by length, which costs nothing here.
    """
    order = SampleOrder([Source(len(dataset), len(dataset))], seed=0)
    plan = BatchPlan(
        samples=len(dataset),
        micro_batch=options.per_gpu_eval_batch_size,
        accumulation=EVALUATED_TOGETHER,
        ranks=ranks,
        epochs=1,
    )
    batching = "packed" if options.batching == "packed" else "grouped"
    return _layout(options, dataset, order, plan, batching)


def _layout(options: RunOptions, dataset: SampleSet, order: SampleOrder, plan: BatchPlan, batching: str) -> Layout:
    """Rows have few lengths on a GPU if they are packed, which hardly adds padding, or if layers are compiled."""
    few_lengths = torch.cuda.is_available() and (batching == "packed" or options.compiled)
    return Layout(dataset, order, plan, batching, options.max_seq_length, few_lengths)


def build_schedule(resolved: Resolved, total_steps: int) -> Schedule:
    """The learning-rate schedule that ``resolved`` names, over ``total_steps``.

    Raises UserError where one of its factors is not a number that is 0 or more.
    """
    chosen, total = resolved.components["lr_scheduler"], max(1, total_steps)
    context = LRSchedulerContext(total_steps=total, learning_rate=resolved.core.learning_rate)
    schedule: Schedule = chosen.build(context, Callable)
    fault = f"take another `lr_scheduler`. It is of {chosen.offer.describe()}."
    factors = {completed: schedule(completed) for completed in steps_to_try(total)}
    for completed, factor in factors.items():
        if not is_factor(factor):
            raise UserError(
                f"lr_scheduler: {chosen.component.describe()} returned {factor!r} for the step after {completed:,} of"
                f" {total:,}. The factor of a learning rate is a finite number that is not negative. Change its"
                f" options, or {fault}"
            )
    # Of the later ones first: one that counts its calls gives another factor then.
    for completed, factor in reversed(factors.items()):
        if (again := schedule(completed)) != factor:
            raise UserError(
                f"lr_scheduler: {chosen.component.describe()} returned {factor!r} for the step after {completed:,}, and"
                f" {again!r} when it was asked again. It is asked several times, on each rank and when a run is"
                f" resumed, so a factor has to follow from the number of steps alone. Until it does, {fault}"
            )
    return lambda completed: float(schedule(completed))


def build_optimizer(resolved: Resolved, model: torch.nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that ``resolved`` names, over the trainable parameters of ``model``."""
    options = resolved.core
    groups = param_groups(
        model,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        decay_on=options.weight_decay_on,
        multipliers=rate_multipliers(options.lr_multipliers),
    )
    context = OptimizerContext(
        param_groups=groups,
        device=device,
        bit_training=options.bit_training,
        described=describe_parameters(model),
        learning_rate=options.learning_rate,
    )
    chosen = resolved.components["optimizer"]
    optimizer: torch.optim.Optimizer = chosen.build(context, torch.optim.Optimizer)
    if hasattr(optimizer, "bind"):
        refuse_undeclared(resolved)
    elif (needs := chosen.component.needs) != "nothing":
        raise UserError(
            f"optimizer: {chosen.component.describe()} declares needs={needs!r}, and its optimizer has no method"
            " `bind`, so it would take a part of a parameter for the whole one. This is a fault of"
            f" {chosen.offer.describe()}."
        )
    given, taken = ({id(p) for group in each for p in group["params"]} for each in (groups, optimizer.param_groups))
    if given != taken:
        raise UserError(
            f"optimizer: {chosen.component.describe()} was given {number_of(len(given), 'parameter')}, of which its"
            f" optimizer leaves out {len(given - taken):,}; it has {len(taken - given):,} others. They would not be"
            f" trained. `freeze` leaves parameters out. This is a fault of {chosen.offer.describe()}."
        )
    return optimizer
