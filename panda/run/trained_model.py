"""The model that a run trains, in its engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from panda.data.packing import Layout
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.frozen import FrozenModel
from panda.engine.frozen import WithoutAdapters
from panda.engine.processes import Processes
from panda.files.activity import activity
from panda.models.forward.isolation import refuse_leaking
from panda.models.forward.isolation import refuse_without_positions
from panda.models.forward.layers import without_compiling
from panda.models.forward.packed_rows import leave_out
from panda.models.forward.packed_rows import takes_positions
from panda.models.forward.stretched_positions import needs_positions
from panda.models.forward.trial import refuse_unfit
from panda.models.forward.varlen_attention import attend_by_kernel
from panda.optim.schedules import Schedule
from panda.run.assembly import build_optimizer
from panda.run.assembly import build_schedule
from panda.run.model import make_trainable
from panda.run.model import seed_random
from panda.run.preparation import Preparation
from panda.run.reference import build_reference
from panda.run.reference import is_second_model
from panda.weights.stored_tensor import bytes_of
from panda.weights.stored_tensor import counted
from panda.weights.stored_tensor import whole_shape


@dataclass(frozen=True)
class TrainedModel:
    """A model in its engine, with its schedule and its numbers of parameters."""

    base: torch.nn.Module
    """The model without peft's wrapper, if it has adapters."""
    reference: FrozenModel | WithoutAdapters | None
    """What the task compares it with."""
    parts: tuple[str, ...]
    """Names of the parts that the task gave it."""
    engine: Engine
    schedule: Schedule
    """Completed optimizer steps to a factor of the peak learning rate."""
    config: dict[str, Any]
    """What DeepSpeed was given."""
    parameters: int
    trained_parameters: int


def trained_model(prepared: Preparation, layout: Layout, processes: Processes) -> TrainedModel:
    """The model of ``prepared`` with its weights, in an engine with its optimizer. Every rank has to call it.

    Seeds the random generators for training. Raises UserError if the model looks ahead or has no logits for the
    tokenizer, or if the samples in a packed row of ``layout`` would see each other.
    """
    options = prepared.options
    config = deepspeed_config(options, world_size=processes.world_size, on_gpu=processes.device.type == "cuda")
    name = prepared.resolved.components["model"].component.name
    # Before the model: its errors are found at once.
    schedule = build_schedule(prepared.resolved, layout.plan.total_steps)

    wants_positions = prepared.outline is not None and needs_positions(prepared.outline)
    bounded = (layout.packed or wants_positions) and not prepared.why_masked
    kernel = prepared.kernel if bounded else None
    reference = _second_model(prepared, config, processes, packed=layout.packed, kernel=kernel)
    base, weights = prepared.take_base()
    parts = prepared.parts_of(base)
    if layout.packed:
        refuse_without_positions(base, name)
    if kernel is not None:
        attend_by_kernel(base, kernel)
    models = [base, *([reference.module] if reference is not None else [])]
    if any(map(needs_positions, models)):
        for each in models:
            if not takes_positions(each):  # one of several, whose rows are no more than a sample
                leave_out(each, "position_ids")
    parameters = sum(parameter.numel() for part in (base, *parts.values()) for parameter in part.parameters())
    started = prepared.pretrained.adapters if prepared.pretrained else None
    what = "loading the weights" if prepared.pretrained else "drawing the weights"
    with activity(what, bytes_of(weights or {}) or None, unit="B", announced=True) as shown:
        left = counted(weights, shown.advance) if weights else None
        del weights
        # Without a mask, code depends on numbers and sizes of samples, too, and is compiled once for all.
        shapes = layout.shapes() if options.compiled and not bounded else None
        model = make_trainable(base, options, left, config, processes, started, parts=parts, shapes=shapes)
        del left
    seed_random(options.seed + processes.data_rank)  # ranks with different data draw different dropout
    optimizer = build_optimizer(prepared.resolved, model, processes.device)
    trained = sum(math.prod(whole_shape(p)) for p in model.parameters() if p.requires_grad)
    if live := prepared.live_parameters:
        config["zero_optimization"]["stage3_max_live_parameters"] = live
    with activity("starting the engine, and trying the model", announced=True):
        engine = Engine(model, optimizer, config, processes)
        with without_compiling(options.compiled):
            refuse_unfit(engine.evaluating(), name, len(prepared.tokenizer), processes.device)
            if layout.packed:
                entries = prepared.context.vocab_size
                refuse_leaking(engine.evaluating(), name, entries, processes.device, bounded=bounded)
    compared: FrozenModel | WithoutAdapters | None = reference
    if prepared.reference is not None and reference is None:
        compared = WithoutAdapters(engine.module)
    return TrainedModel(base, compared, tuple(parts), engine, schedule, engine.config, parameters, trained)


def _second_model(
    prepared: Preparation, config: dict[str, Any], processes: Processes, *, packed: bool, kernel: str | None
) -> FrozenModel | None:
    """The frozen model that the task asks for besides the model, if it does. Every rank has to call it."""
    reference = prepared.reference
    if reference is None or not is_second_model(reference, prepared.options):
        return None
    with activity("placing the frozen model", announced=True):
        return build_reference(
            reference,
            prepared.configuration,
            prepared.context,
            prepared.tokenizer,
            config,
            processes,
            packed=packed,
            kernel=kernel,
        )
