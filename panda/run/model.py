"""The model of a run: its outline (the module without weights), its weights, and how it is made trainable."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from panda.configuration.from_checkpoint import config_for
from panda.configuration.options import RunOptions
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.placement import place
from panda.engine.processes import Processes
from panda.engine.processes import own_device
from panda.engine.tensor_parallel import plan_of
from panda.engine.tensor_parallel import shards_of
from panda.engine.tensor_parallel import split
from panda.models.adapters.lora import add_adapters
from panda.models.adapters.lora import start_from
from panda.models.adapters.quantisation import quantise
from panda.models.forward.layers import compile_layers
from panda.models.forward.layers import recompute_activations
from panda.models.forward.padding_row import free_padding_row
from panda.models.initialisation.creation import without_weights
from panda.models.initialisation.drawing import initial_weights
from panda.models.initialisation.drawing import kind_of
from panda.registry import UserError
from panda.registry.contexts import ModelContext
from panda.registry.resolve import Resolved
from panda.weights.pretrained import Pretrained
from panda.weights.pretrained import fitted
from panda.weights.stored_tensor import Places
from panda.weights.stored_tensor import StoredTensor
from panda.weights.stored_tensor import Weights
from panda.weights.stored_tensor import places_of
from panda.weights.stored_tensor import put
from panda.weights.stored_tensor import weights_of
from panda.weights.tokenizers import read_tokenizer
from panda.weights.tokenizers import rows_needed


def model_context(resolved: Resolved, tokenizer: Any, pretrained: Pretrained | None = None) -> ModelContext:
    """What a model's factory is given besides its options.

    Raises UserError if ids of the tokenizer lie beyond the rows of ``pretrained``.
    """
    rows = rows_needed(tokenizer)
    if pretrained and "panda_model" in pretrained.config:
        return _context_of_export(pretrained, resolved, tokenizer, rows)
    return ModelContext(
        vocab_size=rows,
        max_seq_length=resolved.core.max_seq_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        config=config_for(pretrained, rows, extend=resolved.core.extend_vocab) if pretrained else None,
        new_rows_from=_known_rows(pretrained, rows) if pretrained and resolved.core.extend_vocab else None,
    )


def _known_rows(pretrained: Pretrained, needed: int) -> int | None:
    """The rows for which ``pretrained`` has tokens: fewer than its embedding has, if the rest were room to spare.

    None if a tokenizer whose ids are below ``needed`` has no others.
    """
    holder = replace(pretrained, adapters=None).with_tokenizer()
    known = [pretrained.vocabulary or needed]
    if holder is not None:
        known.append(rows_needed(read_tokenizer(holder.folder)))
    return min(known) if min(known) < needed else None


def _context_of_export(pretrained: Pretrained, resolved: Resolved, tokenizer: Any, rows: int) -> ModelContext:
    """What the factory of a package's model was given for ``pretrained``, its export; with this tokenizer.

    Raises UserError if ids of the tokenizer lie beyond its rows.
    """
    if resolved.core.extend_vocab:
        raise UserError(
            "extend_vocab: rows can only be added to models of transformers: which tensors of a package's model have"
            " one for each entry is not known. Use the tokenizer of the export."
        )
    config_for(pretrained, rows, extend=False)
    return replace(
        ModelContext(**pretrained.config["context"]),
        max_seq_length=resolved.core.max_seq_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def build_outline(resolved: Resolved, context: ModelContext) -> torch.nn.Module | None:
    """The module that ``resolved`` names, without weights; None if it can only be built with weights."""
    try:
        with torch.device("cpu"), without_weights():
            outline: torch.nn.Module = resolved.components["model"].build(context, torch.nn.Module)
        if context.new_rows_from is not None:
            outline.new_rows = range(context.new_rows_from, context.vocab_size)  # type: ignore[assignment]
    except (UserError, ImportError, NameError, AttributeError):  # nothing that lack of weights would cause
        raise
    except Exception:
        if context.config is not None:  # the model of a checkpoint is always built without weights
            raise
        return None
    return outline


def random_weights(outline: torch.nn.Module | None, seed: int) -> Weights | None:
    """Random weights of ``outline``, drawn when they are read; None for no outline: a model built with its weights."""
    return initial_weights(outline, seed, own_device()) if outline is not None else None


def base_weights(pretrained: Pretrained | None) -> str:
    """The identity of the weights that adapters are trained on; where they are random, what they depend on."""
    if pretrained:
        return pretrained.identity
    device = own_device()
    return "random" if device.type == "cpu" else f"random, drawn on a {kind_of(device)}"


def build_with_weights(resolved: Resolved, context: ModelContext) -> tuple[torch.nn.Module, Weights]:
    """The module that ``resolved`` names, built with random weights from its seed, and these weights.

    They are the same on every rank.
    """
    # In host memory, where the model is built whole on every rank.
    seed_random(resolved.core.seed)
    with torch.device("cpu"):
        model: torch.nn.Module = resolved.components["model"].build(context, torch.nn.Module)
    return model, weights_of(model)


def build_weights(
    resolved: Resolved, context: ModelContext, pretrained: Pretrained | None
) -> tuple[torch.nn.Module, Weights]:
    """The module that ``resolved`` names, and its weights: those of ``pretrained``, or random ones from its seed.

    The module is still without weights, unless it had to be built with them; each is read or drawn when needed.
    """
    outline = build_outline(resolved, context)
    if pretrained:
        assert outline is not None, "the model of a checkpoint is always built without weights"
        return outline, fitted(outline, pretrained)
    weights = random_weights(outline, resolved.core.seed)
    if outline is None or weights is None:
        return build_with_weights(resolved, context)
    return outline, weights


def refuse_splitting(outline: torch.nn.Module, resolved: Resolved) -> None:
    """Raise UserError if ``outline`` cannot be split over as many tensor-parallel ranks as ``resolved`` says."""
    if resolved.core.tensor_parallel_size > 1:
        plan_of(outline, resolved.components["model"].component.name, resolved.core.tensor_parallel_size)


def make_trainable(
    model: torch.nn.Module,
    options: RunOptions,
    weights: Weights | None,
    deepspeed: dict[str, Any],
    processes: Processes,
    adapters: Path | None = None,
    *,
    parts: Mapping[str, torch.nn.Module] | None = None,
    shapes: Mapping[tuple[int, int], int] | None = None,
) -> torch.nn.Module:
    """``model`` ready to be trained: with ``weights``, and split, quantised, adapted and compiled by ``options``.

    ``adapters``: a folder with those to start from. Otherwise they are drawn. ``parts``: what the task gives it.
    ``shapes``: of the rows that it is trained on, and how often, as in ``compile_layers``.
    Returns the same object, or with adapters peft's wrapper around it. Every rank has to call it.
    """
    free_padding_row(model)
    if processes.tensor_ranks > 1:
        split(model, plan_of(model, type(model).__name__, processes.tensor_ranks), processes)
        weights = shards_of(weights, model, processes) if weights else None
    left = dict(weights or {})
    if options.use_quant:
        quantise(model, options, processes.device, partial(_fill, places_of(model), left) if left else None)
    if left:
        place(model, left, options, deepspeed, processes)
    for name, part in (parts or {}).items():  # whole on every rank: under ZeRO-3 the engine partitions them
        model.add_module(name, part.to(processes.device, getattr(torch, options.dtype_name)))
    model.new_parts = tuple(parts or ())  # type: ignore[assignment]
    if options.use_lora:
        from panda.models.adapters.one_rounding import round_once  # imports peft

        seed_random(options.seed)  # so adapters start the same, whatever random numbers the base took
        with processes.device:
            model = add_adapters(model, options, deepspeed if options.zero == 3 else None)
        if adapters:
            start_from(model, adapters)
        if options.zero == 3 and options.precision != "fp32":
            for parameter in model.parameters():  # DeepSpeed casts a whole model, but none with partitioned weights
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(getattr(torch, options.dtype_name))
        round_once(model, recomputed=options.activation_checkpointing == "full")
    if options.activation_checkpointing == "selective":
        recompute_activations(model, selective=True)
    if options.compiled:
        compile_layers(model, processes.device, shapes)
    if options.activation_checkpointing == "full":
        # Around compiled layers: in code that recomputes, torch (2.11) keeps what bitsandbytes computes, four times as
        # much (H200, 2026-11-26).
        recompute_activations(model, selective=False)
    return model


def load_base(
    model: torch.nn.Module, options: RunOptions, weights: Weights | None, device: torch.device
) -> torch.nn.Module:
    """``model`` as the base on which a run with ``options`` trained adapters: whole, on ``device``, for inference."""
    plain = replace(options, use_lora=False, zero_stage=0, activation_checkpointing="none", compile=False)
    config = deepspeed_config(plain, world_size=1, on_gpu=device.type == "cuda")
    base: Any = make_trainable(model, plain, weights, config, Processes(0, 1, device)).to(device)
    if hasattr(base, "config"):
        base.config.use_cache = True
    loaded: torch.nn.Module = base.requires_grad_(False).eval()
    return loaded


def _fill(places: dict[str, Places], weights: dict[str, StoredTensor], name: str, layer: torch.nn.Module) -> None:
    """Move the weights of ``layer``, called ``name`` in the model, from ``weights`` to its ``places``."""
    for key, _ in layer.named_parameters():
        # Taken out of both, which would keep the layer and its weights after it has been replaced.
        put(places.pop(f"{name}.{key}"), weights.pop(f"{name}.{key}").read())


def seed_random(seed: int) -> None:
    """Seed the generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
