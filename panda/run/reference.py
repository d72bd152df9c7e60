"""The frozen model that a task compares the trained one with: which it is, how large, and how it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from panda.configuration.configure import Configuration
from panda.configuration.options import RunOptions
from panda.configuration.positions import positions_of_checkpoint
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
from panda.run.model import base_weights
from panda.run.model import build_weights
from panda.run.model import make_trainable
from panda.run.model import model_context
from panda.weights.finding import Source
from panda.weights.finding import checkpoint_at
from panda.weights.pretrained import Pretrained
from panda.weights.pretrained import fitted
from panda.weights.tokenizers import has_tokenizer
from panda.weights.tokenizers import read_tokenizer


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


def reference_weights(resolved: Resolved, pretrained: Pretrained | None) -> str | None:
    """The identity of the weights of the frozen model, of a run from ``pretrained``; None where it has none."""
    reference = reference_of(resolved)
    if reference is None:
        return None
    return base_weights(pretrained if reference.checkpoint is None else _found(reference.checkpoint, resolved))


def reference_config(resolved: Resolved) -> Mapping[str, Any]:
    """The config.json of the frozen model; empty where the run has none, or it is the model that the run starts as."""
    reference = reference_of(resolved)
    return _found(reference.checkpoint, resolved).config if reference and reference.checkpoint is not None else {}


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
    whether rows hold several samples. ``kernel``: the run's attention kernel, which is given the bounds of samples;
    None if the run uses a mask. Raises UserError if the model of a checkpoint looks ahead, or does not keep the samples
    of a row apart.
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
    """Make ``module`` use ``kernel`` for attention. If it cannot, returns what it uses instead, and why; else empty."""
    if why := why_masked(module, device, dtype):
        attend_with_mask(module)
        return f"with a mask, since {why}"
    why = why_not_flash_4(module, device, dtype) if kernel == FLASH_4 else ""
    attend_by_kernel(module, VARLEN if why else kernel)
    return f"by {KERNELS[VARLEN]}, since for {KERNELS[FLASH_4]} {why}" if why else ""


def refuse_unusable(reference: Reference, resolved: Resolved, tokenizer: Any) -> None:
    """Raise UserError if ``reference`` names a checkpoint that cannot be the run's frozen model.

    That is one that cannot be read, has other tokens than ``tokenizer``, the run's, or fewer positions than its rows
    may have; and any in a run with tensor parallelism, which cannot split it.
    """
    if reference.checkpoint is None:
        return
    key, found = _key_of(reference.checkpoint, resolved), _found(reference.checkpoint, resolved)
    _refuse_other_tokens(f"{key}: {reference.checkpoint!r}", found.folder, tokenizer)
    positions = positions_of_checkpoint(found)
    length = resolved.core.max_seq_length
    if positions is not None and length > positions.count:
        raise UserError(
            f"max_seq_length: {length}, but {key} {reference.checkpoint!r} is made for {positions.count} positions"
            f" ({positions.reason}). Lower max_seq_length."
        )
    if resolved.core.tensor_parallel_size > 1:
        raise UserError(
            f"tensor_parallel_size: the frozen model at {key} {reference.checkpoint!r} cannot be split over ranks."
            " Write `zero_stage: 3` in its place, which divides the weights of both models."
        )


def _refuse_other_tokens(who: str, folder: Path, tokenizer: Any) -> None:
    """Raise UserError if the tokenizer in ``folder`` gives a token of ``tokenizer`` another number, or its number to
    another token. Tokens that it lacks are allowed: the run may have added them.
    """
    try:
        theirs = read_tokenizer(folder).get_vocab() if has_tokenizer(folder) else {}
    except UserError:  # a damaged one, which is not needed
        return
    tokens = {number: token for token, number in theirs.items()}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):  # of all ranks the same
        if theirs.get(token, number) != number or tokens.get(number, token) != token:
            raise UserError(
                f"{who} has another tokenizer than the run: {token!r} is not the same token there. What it says is of"
                " its own tokens. Give a model and a `tokenizer` that belong together."
            )


def _key_of(checkpoint: str, resolved: Resolved) -> str:
    """The option of the task that names ``checkpoint``."""
    values = asdict(resolved.components["task"].options)
    return next((name for name, value in values.items() if value == checkpoint), "task")


def _found(checkpoint: str, resolved: Resolved) -> Pretrained:
    key = _key_of(checkpoint, resolved)
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
