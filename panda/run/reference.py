"""The frozen model that a task compares the trained one with: which it is, how large, and how it is made."""

from __future__ import annotations

from dataclasses import asdict
from dataclasses import replace
from typing import Any

import torch

from panda.configuration.configure import Configuration
from panda.configuration.options import RunOptions
from panda.engine.frozen import FrozenModel
from panda.engine.frozen import freeze
from panda.engine.processes import Processes
from panda.files.activity import say
from panda.models.causal_lm import build_causal_lm
from panda.models.forward.isolation import refuse_leaking
from panda.models.forward.isolation import refuse_without_positions
from panda.models.forward.trial import refuse_unfit
from panda.models.forward.varlen_attention import FLASH_4
from panda.models.forward.varlen_attention import KERNELS
from panda.models.forward.varlen_attention import VARLEN
from panda.models.forward.varlen_attention import attend_by_kernel
from panda.models.forward.varlen_attention import attend_with_mask
from panda.models.forward.varlen_attention import why_masked
from panda.models.forward.varlen_attention import why_not_flash_4
from panda.models.hf import HfOptions
from panda.models.hf import build_hf
from panda.models.initialisation.creation import without_weights
from panda.registry import UserError
from panda.registry.contexts import ModelContext
from panda.registry.contexts import Reference
from panda.registry.resolve import Resolved
from panda.run.model import build_weights
from panda.run.model import make_trainable
from panda.run.model import model_context
from panda.weights.finding import Source
from panda.weights.finding import checkpoint_at
from panda.weights.pretrained import Pretrained
from panda.weights.pretrained import fitted


def reference_of(resolved: Resolved) -> Reference | None:
    """The frozen model that the task of ``resolved`` asks for; None for none."""
    task = resolved.components["task"]
    asked: Any = getattr(task.component.factory, "reference_of", None)
    if asked is None:
        return None
    with task.attributed("`reference_of`"):
        found: Reference | None = asked(task.options)
    return found


def refuse_adapted(reference: Reference, pretrained: Pretrained | None) -> None:
    """Raise UserError where ``reference`` is of the start of a run that goes on from the adapters of ``pretrained``.

    The base with its adapters off is not that: it lacks what these adapters have learned.
    """
    if reference.checkpoint is None and pretrained is not None and pretrained.adapters:
        raise UserError(
            f"ckpt_path: the run starts from the adapters in {pretrained.adapters}, and the task compares the model"
            " with the weights at the start, which the base without them is not. Merge them into their base first:"
            " `panda export RUN --merge`."
        )


def is_second_model(reference: Reference | None, options: RunOptions) -> bool:
    """Whether ``reference`` is a model of its own, and not the base of the run's adapters."""
    return reference is not None and (reference.checkpoint is not None or not options.use_lora)


def describe_reference(reference: Reference, options: RunOptions) -> str:
    """What it is, in one line."""
    if reference.checkpoint is not None:
        return f"frozen, from {reference.checkpoint}"
    if options.use_lora:
        return "the base, with the adapters off"
    return "a frozen copy of the weights that the run starts from"


def reference_elements(reference: Reference, resolved: Resolved) -> int:
    """The weights of the checkpoint that ``reference`` names."""
    assert reference.checkpoint is not None
    found = _found(reference.checkpoint, resolved)
    with torch.device("meta"), without_weights():
        module = build_causal_lm(found.config, reference.checkpoint)
    return sum(parameter.numel() for parameter in module.parameters())


def build_reference(
    reference: Reference,
    configuration: Configuration,
    context: ModelContext,
    tokenizer: Any,
    config: dict[str, Any],
    processes: Processes,
    *,
    packed: bool,
    kernel: str | None,
) -> FrozenModel:
    """The frozen model, placed like the model that is trained. Every rank has to call it.

    Before the run's random numbers are seeded, which it may draw from. ``config``: DeepSpeed's for the run. ``packed``:
    whether rows hold several samples. ``kernel``: of attention that is told where samples begin, the run's; None for a
    mask. Raises UserError for a checkpoint of a model that looks ahead, or whose samples in a row see each other.
    """
    resolved, options = configuration.resolved, configuration.options
    plain = replace(options, use_lora=False, use_quant=False, activation_checkpointing="none", compile=False)
    if reference.checkpoint is None:
        module, weights = build_weights(resolved, context, configuration.pretrained)
    else:
        module, pretrained = _of_checkpoint(reference.checkpoint, resolved, tokenizer)
        weights = fitted(module, pretrained)
    name = f"{reference.checkpoint} (frozen)"
    if packed:
        refuse_without_positions(module, name)
    if kernel is not None and (other := _attend(module, kernel, processes.device, getattr(torch, options.dtype_name))):
        say(f"attention of the frozen model {other}")
    frozen = freeze(make_trainable(module, plain, weights, config, processes), options, config, processes)
    if reference.checkpoint is not None:  # else it is the model that is trained, which is tried itself
        refuse_unfit(frozen, name, len(tokenizer), processes.device)
        if packed:
            refuse_leaking(frozen, name, len(tokenizer), processes.device, bounded=kernel is not None)
    return frozen


def _attend(module: torch.nn.Module, kernel: str, device: torch.device, dtype: torch.dtype) -> str:
    """Make ``module`` attend by ``kernel``, or if it cannot, otherwise. Returns how and why then; empty if it can."""
    if why := why_masked(module, device, dtype):
        attend_with_mask(module)
        return f"with a mask, since {why}"
    why = why_not_flash_4(module, device, dtype) if kernel == FLASH_4 else ""
    attend_by_kernel(module, VARLEN if why else kernel)
    return f"by {KERNELS[VARLEN]}, since for {KERNELS[FLASH_4]} {why}" if why else ""


def refuse_missing(reference: Reference, resolved: Resolved) -> None:
    """Raise UserError where the checkpoint that ``reference`` names, if it names one, is not one that can be read."""
    if reference.checkpoint is not None:
        _found(reference.checkpoint, resolved)


def _found(checkpoint: str, resolved: Resolved) -> Pretrained:
    values = asdict(resolved.components["task"].options)
    key = next((name for name, value in values.items() if value == checkpoint), "task")
    found = checkpoint_at(Source(checkpoint, key, allow_pickle=resolved.core.allow_pickle))
    if found.adapters or "panda_model" in found.config:
        raise UserError(
            f"{key}: {checkpoint}: the frozen model of a task is a whole model of transformers, and this is"
            f" {found.describe()}. Merge adapters into their base first: `panda export RUN --merge`."
        )
    return found


def _of_checkpoint(checkpoint: str, resolved: Resolved, tokenizer: Any) -> tuple[torch.nn.Module, Pretrained]:
    found = _found(checkpoint, resolved)
    core = replace(resolved.core, extend_vocab=False)
    context = model_context(replace(resolved, core=core), tokenizer, found)
    with torch.device("cpu"), without_weights():
        return build_hf(HfOptions(), context), found
