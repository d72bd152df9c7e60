"""Whether a run fits a card, which single change makes it fit, and the errors of a run that does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import torch

from panda.configuration.options import IMPLIED
from panda.configuration.options import RunOptions
from panda.configuration.refusals import REFUSALS
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.memory import refuse_without_room
from panda.engine.memory_parts import Sizes
from panda.engine.memory_parts import gib
from panda.engine.memory_parts import held
from panda.engine.processes import own_device
from panda.files.terminal import number_of
from panda.models.adapters.quantisation import refuse_quantising
from panda.registry import UserError
from panda.registry.contexts import ModelContext
from panda.registry.resolve import Resolved
from panda.run.cards import Card
from panda.run.cards import this_card
from panda.run.compiling import Work
from panda.run.compiling import as_chosen
from panda.run.estimate import Estimate
from panda.run.estimate import ModelMemory
from panda.run.estimate import copies_of
from panda.run.estimate import estimate
from panda.run.estimate import model_memory
from panda.run.estimate import state_bytes

CHECKPOINTING = ("none", "selective", "full")
"""Ways to keep activations, the fastest first."""
STAGES = (0, 1, 2, 3)
RANKS = (1, 2, 4, 8, 16, 32, 64)

_SHAPING = (
    *("precision", "tensor_parallel_size", "batching", "max_seq_length", "bit_training"),
    *("use_lora", "use_quant", "quant_bits"),
)
"""Keys of every run on which the outline, its activations or the optimizer's states depend."""


class Estimates:
    """Estimates of one run and of variants of it; the outline of each kind is built once."""

    def __init__(self, context: ModelContext) -> None:
        self.context = context
        self._models: dict[Any, ModelMemory | None] = {}

    def model(self, resolved: Resolved) -> ModelMemory | None:
        """What the model of ``resolved``, a variant of the run, needs; None if it can only be built with weights."""
        shape = tuple(getattr(resolved.core, key) for key in _SHAPING)
        if shape not in self._models:
            context = replace(self.context, max_seq_length=resolved.core.max_seq_length)
            self._models[shape] = model_memory(resolved, context)
        return self._models[shape]

    def of(self, resolved: Resolved, world_size: int, staying: int = 0) -> Estimate | None:
        """The memory of each of ``world_size`` GPUs; None if the model can only be built with weights.

        ``staying``: layers that ZeRO-3 keeps gathered through a step.
        """
        model = self.model(resolved)
        return estimate(model, resolved.core, world_size, staying) if model else None


@dataclass(frozen=True)
class Change:
    """Other values for a run that does not fit."""

    values: dict[str, Any]
    world_size: int
    remark: str = ""

    def describe(self, world_size: int) -> str:
        """As a user writes it, for a run that has ``world_size`` ranks."""
        keys = [f"`{key}: {'true' if value is True else value}`" for key, value in self.values.items()]
        ranks = [f"{self.world_size} GPUs"] * (self.world_size != world_size)
        return " with ".join(keys + ranks) + (f" ({self.remark})" if self.remark else "")


def changes(options: RunOptions, world_size: int) -> Iterator[Change]:
    """Single changes that lower the memory of a run, those that cost least first."""
    rows, steps = options.per_gpu_train_batch_size, options.gradient_accumulation_steps
    for smaller in range(rows - 1, 0, -1):
        if rows % smaller == 0:
            split = {"per_gpu_train_batch_size": smaller, "gradient_accumulation_steps": steps * rows // smaller}
            yield Change(split, world_size, "the same trajectory")
    if options.activation_checkpointing in CHECKPOINTING:  # `auto` is the fastest that fits in any case
        for how in CHECKPOINTING[CHECKPOINTING.index(options.activation_checkpointing) + 1 :]:
            yield Change({"activation_checkpointing": how}, world_size)
    if world_size > options.tensor_parallel_size:
        for stage in range(options.zero + 1, 4):
            yield Change({"zero_stage": stage}, world_size)
    if options.optimizer.lower() == "adamw" and not options.bit_training:
        yield Change({"bit_training": True}, world_size, "optimizer states in 8 bits")
    if not options.use_lora:
        yield Change({"use_lora": True}, world_size, "trains adapters only")
    if not options.use_quant:
        new = {key: value for key, value in IMPLIED["use_quant"][0].items() if getattr(options, key) != value}
        yield Change({"use_quant": True, **new}, world_size, "trains adapters on a base in 4 bits")
    length = options.max_seq_length // 2
    while length >= 128:
        yield Change({"max_seq_length": length}, world_size, "longer samples are cut")
        length //= 2
    for more in (2, 4, 8, 16):
        yield Change({} if options.zero == 3 else {"zero_stage": 3}, world_size * more)


def cheapest_change(
    estimates: Estimates, resolved: Resolved, world_size: int, card: Card
) -> tuple[Change, Estimate] | None:
    """The first of ``changes`` with which the run fits ``card``, and its memory then; None if none does."""
    for change in changes(resolved.core, world_size):
        tried = resolved.with_values(change.values, "tried")
        if resolved.settings["compile"].origin.startswith("decided") and refused(tried):
            tried = tried.with_values({"compile": False}, "tried")  # as a run with that change would decide
        if refused(tried):
            continue
        try:
            found = on_card(estimates, tried, change.world_size, card)[1]
        except UserError:  # this combination is refused later, such as by the model
            continue
        if found is not None and found.fits(card):
            return change, found
    return None


def refused(resolved: Resolved) -> bool:
    """Whether ``resolved`` is a combination that panda refuses."""
    return any(refusal.refuses(resolved) for refusal in REFUSALS)


def advice(estimates: Estimates, resolved: Resolved, world_size: int, card: Card) -> str:
    """A sentence: the cheapest single change with which the run fits ``card``."""
    found = cheapest_change(estimates, resolved, world_size, card)
    if found is None:
        return f"No single change makes it fit {card.name}: take a smaller model, or combine several (docs/memory.md)."
    change, then = found
    return (
        f"The cheapest single change that makes it fit {card.name}: {change.describe(world_size)},"
        f" about {gib(then.parts.total)} GiB."
    )


def on_card(
    estimates: Estimates, resolved: Resolved, world_size: int, card: Card, work: Work | None = None
) -> tuple[str, Estimate | None]:
    """How the run keeps activations on ``card``, and its memory then; no memory where it cannot be estimated.

    `auto` is the fastest way with which the run fits; the one that takes least memory, where it fits with none. With
    each of them it is compiled or not as it would decide; without its ``work``, as a long run.
    """
    how, model = resolved.core.activation_checkpointing, estimates.model(resolved)
    if model is None:
        return "none" if how == "auto" else how, None
    if how != "auto":
        return how, estimate(model, as_chosen(resolved, model, card, work), world_size)
    ways = CHECKPOINTING if model.footprint.layers else CHECKPOINTING[:1]  # only layers can be computed again
    tried: dict[str, Estimate] = {}
    for way in ways:
        options = as_chosen(resolved.with_values({"activation_checkpointing": way}, "tried"), model, card, work)
        if not refused(replace(resolved, core=options)):
            tried[way] = estimate(model, options, world_size)
            if tried[way].fits(card):
                return way, tried[way]
    least = min(tried, key=lambda way: tried[way].parts.total)
    return least, tried[least]


def explanation(estimates: Estimates, resolved: Resolved, world_size: int, card: Card, staying: int = 0) -> str:
    """What a step of the run holds, by kind, and the one change that takes less, for a run that had no memory left.

    ``staying``: layers that ZeRO-3 kept gathered through a step.
    """
    found, least = estimates.of(resolved, world_size, staying), estimates.of(resolved, world_size)
    if found is None or least is None:
        return "The GPU is out of memory. docs/memory.md says what takes less."
    parts = found.parts
    if staying:
        remedy = (
            f"{gib(parts.total - least.parts.total)} of them are"
            f" {number_of(staying, 'layer that stays', 'layers that stay')} gathered for a"
            ' step: `{"zero_optimization": {"stage3_max_live_parameters": 0}}` in the file that `deepspeed_config`'
            " names does without, with the same numbers."
        )
    else:
        # More than was estimated is in use: a change has to save at least that much, too.
        room = replace(card, memory=min(card.memory, parts.total))
        remedy = advice(estimates, resolved, world_size, room)
    return (
        f"The GPU is out of memory. A step with the longest rows is estimated to hold {gib(parts.total)} of"
        f" {gib(card.memory)} GiB: {parts.describe()}. {remedy}"
    )


def _is_quantisable(outline: torch.nn.Module) -> bool:
    """Whether `use_quant` works for the model of ``outline``."""
    try:
        refuse_quantising(outline)
    except UserError:
        return False
    return True


def refuse_too_large(
    outline: torch.nn.Module, resolved: Resolved, context: ModelContext, world_size: int, *, drawn: bool
) -> None:
    """Raise UserError if what ``world_size`` ranks certainly hold of ``outline`` exceeds the memory here.

    ``drawn``: whether each rank draws all weights at once.
    """
    options, device = resolved.core, own_device()
    on_gpu = device.type == "cuda"
    parameters = sum(parameter.numel() for parameter in outline.parameters())
    here = parameters // options.tensor_parallel_size
    bits = options.quant_bits if options.use_quant else 32 if options.precision == "fp32" else 16
    # Adapters are not counted: how many there are is not certain here, and they are small.
    sizes = Sizes(0 if options.use_lora else here, here * bits // 8 * options.use_lora, here, 0, 0)
    parts = held(
        sizes,
        options,
        deepspeed_config(options, world_size=world_size, on_gpu=on_gpu),
        world_size=world_size,
        state_bytes=state_bytes(resolved) if on_gpu else 0,
        copies=copies_of(resolved) if on_gpu else 0,
    ).parts
    estimates = Estimates(context)
    refuse_without_room(
        parameters,
        parts,
        options,
        device,
        drawn=drawn,
        quantisable=_is_quantisable(outline),
        advice=lambda: advice(estimates, resolved, world_size, this_card(device)),
    )
