"""Names to objects: what a resolved configuration is made into, by a run and by the commands that only look."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from panda.configuration.following import config_for
from panda.configuration.options import RunOptions
from panda.configuration.options import rate_multipliers
from panda.data.layouts import Layout
from panda.data.order import BatchPlan
from panda.data.order import SampleOrder
from panda.data.order import Source
from panda.data.reading import Reader
from panda.data.token_cache import cache_folder
from panda.data.token_dataset import SampleSet
from panda.engine.checkpoints.folders import START
from panda.engine.checkpoints.folders import Progress
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.memory import refuse_without_room
from panda.engine.placement import place
from panda.engine.processes import Processes
from panda.engine.tensor_parallel import plan_of
from panda.engine.tensor_parallel import shards_of
from panda.engine.tensor_parallel import split
from panda.models.adapters.lora import add_adapters
from panda.models.adapters.quantisation import quantise
from panda.models.forward.layers import compile_layers
from panda.models.forward.layers import recompute_activations
from panda.models.initialisation.creation import without_weights
from panda.models.initialisation.drawing import initial_weights
from panda.optim.param_groups import param_groups
from panda.optim.schedules import Schedule
from panda.registry import UserError
from panda.registry.contexts import LRSchedulerContext
from panda.registry.contexts import ModelContext
from panda.registry.contexts import OptimizerContext
from panda.registry.contexts import ReaderContext
from panda.registry.contexts import TaskContext
from panda.registry.resolve import Resolved
from panda.tasks.language_modelling import LanguageModelling
from panda.weights.pretrained import Pretrained
from panda.weights.pretrained import fitted
from panda.weights.stored_tensor import StoredTensor
from panda.weights.stored_tensor import Weights
from panda.weights.stored_tensor import put
from panda.weights.stored_tensor import weights_of
from panda.weights.tokenizers import read_tokenizer
from panda.weights.tokenizers import tokenizer_folder

EVALUATED_TOGETHER = 16
"""Micro batches of an evaluation, on each rank, whose samples are laid out in rows together and held in memory."""


def load_tokenizer(location: str) -> Any:
    """The Hugging Face tokenizer in the folder, or on the hub, that ``location`` means. Raises UserError if none is."""
    return read_tokenizer(tokenizer_folder(location))


def build_task(resolved: Resolved, tokenizer: Any) -> LanguageModelling:
    """The task that ``resolved`` names, with its reader. Raises UserError where its data is not there."""
    reader = resolved.components["reader"]
    context = TaskContext(
        tokenizer=tokenizer,
        reader=reader.build(ReaderContext(), Reader),
        max_seq_length=resolved.core.max_seq_length,
        reader_options=reader.options,
        token_cache=cache_folder(resolved.core.token_cache),
    )
    task: LanguageModelling = resolved.components["task"].build(context, LanguageModelling)
    return task


def build_evaluation_task(resolved: Resolved, task: LanguageModelling) -> LanguageModelling | None:
    """``task`` over the data that ``resolved`` is evaluated on; None where it names none.

    Raises UserError where that is not there.
    """
    location = resolved.core.eval_data_dir
    return None if location is None else task.reading(location, "eval_data_dir")


def lay_out(
    options: RunOptions, dataset: SampleSet, ranks: int, progress: Progress = START, *, batching: str | None = None
) -> Layout:
    """How a run with these options goes through ``dataset``, from ``progress`` on."""
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
    return Layout(dataset, order, plan, batching or options.batching, options.max_seq_length)


def lay_out_evaluation(options: RunOptions, dataset: SampleSet, ranks: int) -> Layout:
    """How an evaluation goes through ``dataset``: each sample once, and each rank through as many micro batches.

    Rows are packed where those of the run are, and otherwise grouped by length, which loses nothing here.
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
    return Layout(dataset, order, plan, batching, options.max_seq_length)


def build_schedule(resolved: Resolved, plan: BatchPlan) -> Schedule:
    """The learning-rate schedule that ``resolved`` names, over the steps of ``plan``."""
    context = LRSchedulerContext(total_steps=max(1, plan.total_steps), learning_rate=resolved.core.learning_rate)
    schedule: Schedule = resolved.components["lr_scheduler"].build(context, Callable)
    return schedule


def model_context(resolved: Resolved, tokenizer: Any, pretrained: Pretrained | None = None) -> ModelContext:
    """What a model is told beside its options. Raises UserError where the tokenizer has more than ``pretrained``."""
    return ModelContext(
        vocab_size=len(tokenizer),
        max_seq_length=resolved.core.max_seq_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        config=config_for(pretrained, len(tokenizer), extend=resolved.core.extend_vocab) if pretrained else None,
    )


def build_model(resolved: Resolved, context: ModelContext) -> torch.nn.Module:
    """The module that ``resolved`` names, with random weights, or none where a checkpoint has them."""
    # In host memory, whatever the device and the ZeRO stage: a GPU draws other numbers from a seed, and
    # how a run is spread must not decide where it begins. DeepSpeed moves or spreads the weights.
    with torch.device("cpu"), without_weights() if context.config else nullcontext():
        model: torch.nn.Module = resolved.components["model"].build(context, torch.nn.Module)
    return model


def build_weights(
    resolved: Resolved, context: ModelContext, pretrained: Pretrained | None
) -> tuple[torch.nn.Module, Weights]:
    """The module that ``resolved`` names, and its weights: those of ``pretrained``, or random ones by its seed.

    Random weights of a transformers model are drawn when they are read, and depend on the seed and their names only.
    Another model is built with its weights, after the generators were seeded, the same on every rank.
    """
    seed_random(resolved.core.seed)
    if pretrained:
        model = build_model(resolved, context)
        return model, fitted(model, pretrained)
    outline = build_outline(resolved, context)
    if outline is not None:
        drawn = initial_weights(outline, resolved.core.seed)
        if drawn is not None:
            return outline, drawn
    seed_random(resolved.core.seed)
    model = build_model(resolved, context)
    return model, weights_of(model)


def build_outline(resolved: Resolved, context: ModelContext) -> torch.nn.Module | None:
    """The module that ``resolved`` names, without weights; None where a model wants some while it is made."""
    try:
        with torch.device("cpu"), without_weights():
            outline: torch.nn.Module = resolved.components["model"].build(context, torch.nn.Module)
    except UserError:
        raise
    except Exception:
        if context.config is not None:  # a checkpoint's is always made so
            raise
        return None
    return outline


def refuse_too_large(outline: torch.nn.Module, resolved: Resolved, context: ModelContext) -> None:
    """Raise UserError where the weights of ``outline`` are more than the memory that they are to be in."""
    options = resolved.core
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    on_gpu = torch.cuda.is_available()
    refuse_without_room(
        sum(parameter.numel() for parameter in outline.parameters()),
        options,
        deepspeed_config(options, world_size=world_size, on_gpu=on_gpu),
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu"),
        world_size=world_size,
        drawn=context.config is None and initial_weights(outline, options.seed) is None,
    )


def refuse_splitting(outline: torch.nn.Module, resolved: Resolved) -> None:
    """Raise UserError where ``outline`` cannot be split over tensor-parallel ranks as asked."""
    if resolved.core.tensor_parallel_size > 1:
        plan_of(outline, resolved.components["model"].component.name, resolved.core.tensor_parallel_size)


def make_trainable(
    model: torch.nn.Module,
    options: RunOptions,
    weights: Weights | None,
    deepspeed: dict[str, Any],
    processes: Processes,
) -> torch.nn.Module:
    """``model`` as it is trained: with ``weights``, where it has none, split, quantised, adapted, compiled as asked.

    The same object, but for adapters, which are around it. Every rank has to call it.
    """
    if processes.tensor_ranks > 1:
        split(model, plan_of(model, type(model).__name__, processes.tensor_ranks), processes)
        weights = shards_of(weights, model, processes) if weights else None
    left = dict(weights or {})
    if options.use_quant:
        quantise(model, options, processes.device, partial(_fill, model, left) if left else None)
    if left:
        place(model, left, deepspeed, processes)
    if options.use_lora:
        seed_random(options.seed)  # adapters begin alike, however the base came to be
        is_spread = deepspeed["zero_optimization"]["stage"] == 3
        model = add_adapters(model, options, deepspeed if is_spread else None)
    if options.activation_checkpointing != "none":
        recompute_activations(model, selective=options.activation_checkpointing == "selective")
    if options.compile:
        compile_layers(model, processes.device)
    return model


def load_base(
    model: torch.nn.Module, options: RunOptions, weights: Weights | None, device: torch.device
) -> torch.nn.Module:
    """``model`` as adapters of a run with ``options`` were trained on it, whole, on ``device``, to answer."""
    plain = replace(options, use_lora=False, zero_stage=0, activation_checkpointing="none", compile=False)
    config = deepspeed_config(plain, world_size=1, on_gpu=device.type == "cuda")
    base: Any = make_trainable(model, plain, weights, config, Processes(0, 1, device)).to(device)
    if hasattr(base, "config"):
        base.config.use_cache = True
    loaded: torch.nn.Module = base.requires_grad_(False).eval()
    return loaded


def _fill(model: torch.nn.Module, weights: dict[str, StoredTensor], name: str, layer: torch.nn.Module) -> None:
    """Give ``layer`` of ``model``, by its ``name``, what is its own of ``weights``, and take that out of them."""
    for key, _ in layer.named_parameters():
        put(model, f"{name}.{key}", weights.pop(f"{name}.{key}").read())


def build_optimizer(resolved: Resolved, model: torch.nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that ``resolved`` names, over the parameters of ``model`` that are trained."""
    options = resolved.core
    groups = param_groups(
        model,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        decay_on=options.weight_decay_on,
        multipliers=rate_multipliers(options.lr_multipliers),
    )
    context = OptimizerContext(param_groups=groups, device=device, bit_training=options.bit_training)
    optimizer: torch.optim.Optimizer = resolved.components["optimizer"].build(context, torch.optim.Optimizer)
    return optimizer


def seed_random(seed: int) -> None:
    """Seed the generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
