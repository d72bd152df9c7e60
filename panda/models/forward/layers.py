"""Recomputing the activations of each layer of a model instead of storing them, and compiling each layer."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.checkpoint import checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from panda.registry import UserError
from panda.weights.layer_names import layer_of

CHEAP_TERMS = 256
"""A matrix product over fewer terms, such as an adapter's, costs less to recompute than to store."""

_PRODUCTS = frozenset(
    {
        *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "bitsandbytes::gemm_4bit"),
        "panda::sum_of_products",  # adapters/one_rounding.py
    }
)
_ATTENTION = (
    *("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention"),
    *("torch_attn::_varlen_attn", "flash_attn::"),
)


def numbered_layers(model: torch.nn.Module, key: str) -> list[torch.nn.Module]:
    """The layers of ``model``. Raises UserError, about option ``key``, where it has none."""
    layers = [module for name, module in model.named_modules() if layer_of(name) == name]
    if not layers:
        raise UserError(
            f"{key}: {type(model).__name__} has no numbered layers (`layers.0`, `layers.1`, ...), to which it applies."
            f" Leave `{key}` out."
        )
    return layers


def recompute_activations(model: torch.nn.Module, *, selective: bool) -> None:
    """Make each layer of ``model`` store only its input, and run forward again in the backward pass.

    With ``selective`` it also stores what is expensive to compute, the results of attention and of large
    matrix products, and recomputes the rest: normalisation, activation functions, dropout, dequantisation
    and adapters' products. Random numbers are those of the first forward, so results do not change.
    """
    contexts = {"context_fn": functools.partial(create_selective_checkpoint_contexts, _keep_dear)} if selective else {}
    for layer in numbered_layers(model, "activation_checkpointing"):
        layer.forward = _recomputing(layer.forward, contexts)


def compile_layers(model: torch.nn.Module, device: torch.device) -> None:
    """Make torch compile the forward of each layer when it first runs; layers of the same kind share the work.

    Raises UserError where this machine cannot compile code for ``device``.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"compile: on a CPU torch needs a C++ compiler, and {compiler!r} was not found. Install one (`apt-get"
            " install g++`), name one in the environment variable CXX, or leave `compile` out."
        )
    for layer in numbered_layers(model, "compile"):
        layer.forward = torch.compile(layer.forward)


def _recomputing(forward: Callable[..., Any], contexts: dict[str, Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def recomputing(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        return checkpoint(forward, *arguments, use_reentrant=False, **contexts, **keywords)

    return recomputing


def _keep_dear(context: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    name = operation.name().partition(".")[0]
    if name.startswith(_ATTENTION) and "backward" not in name:
        return CheckpointPolicy.MUST_SAVE
    if name in _PRODUCTS:
        left = arguments[1] if name in ("aten::addmm", "aten::baddbmm") else arguments[0]
        if left.shape[-1] >= CHEAP_TERMS:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
