"""FlashAttention 4's kernels for samples of any length, of the package flash-attn-4.

On Hopper GPUs they are faster than FlashAttention 2, which torch has. The functions that are called here are those that
torch's own integration calls (``activate_flash_attention_impl``). That itself does not fit: torch 2.11 refuses causal
attention in it, and up to 2.13 it expects two results where ``VERSION`` gives five.
"""

from __future__ import annotations

import functools
import importlib
from importlib import metadata
from typing import Any

import torch

from panda.registry.errors import in_brief

PACKAGE, VERSION, MODULE = "flash-attn-4", "4.0.0b36", "flash_attn.cute.interface"
"""The package and its module. The functions that are called are private ones of a beta: no other version's are."""
HEAD_SIZES = (64, 128)
"""For which results were compared with those of torch's kernel (H100, 2026-11), in bf16 and without windows."""


def why_not(device: torch.device) -> str:
    """Why FlashAttention 4 cannot be used on ``device``; empty where it can."""
    try:
        found = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        found = ""
    if found != VERSION:
        has = f"this machine has {PACKAGE} {found}" if found else f"{PACKAGE} is not installed"
        return f"{has}, and it needs version {VERSION}: `pip install 'panda-train[flash]'`"
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] != 9:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"a {device.type.upper()}"
        return f"it was tried on Hopper GPUs only, and this is {name}"
    try:
        _kernels()
    except Exception as problem:  # of an installation that lacks a part
        return f"{PACKAGE} cannot be imported ({in_brief(problem)})"
    return ""


@functools.cache
def _kernels() -> Any:
    """The module with the kernels, which are compiled when they are first called, in 6 to 8 s on an H100."""
    return importlib.import_module(MODULE)


@torch.library.custom_op("panda::flash_attention_4", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float | None,
    before: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, log_sums = _kernels()._flash_attn_fwd(
        query,
        key,
        value,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        window_size_left=before,
        return_lse=True,
    )[:2]
    return out, log_sums


@_forward.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, _size = query.shape
    return query.new_empty(query.shape), query.new_empty(heads, tokens, dtype=torch.float32)  # in no layout of `query`


@torch.library.custom_op("panda::flash_attention_4_backward", mutates_args=())
def _backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    log_sums: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float | None,
    before: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _kernels()._flash_attn_bwd(
        query,
        key,
        value,
        out,
        gradient.contiguous(),
        log_sums,
        softmax_scale=scale,
        causal=True,
        window_size_left=before,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )[:3]
    return gradients


@_backward.register_fake
def _(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, bounds, *ctx.more = inputs
    ctx.save_for_backward(query, key, value, *output, bounds)


def _differentiate(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_backward(gradient, *ctx.saved_tensors, *ctx.more), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def flash_attention_4(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    bounds: torch.Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention within samples: [tokens, heads, size], of ``query``, in bfloat16 or float16 on a GPU.

    ``key`` and ``value`` are as long, and may have fewer heads. ``bounds``: int32 [samples + 1], where samples begin;
    none has more than ``longest`` tokens. A token sees at most ``window`` tokens, itself included.
    """
    before = None if window is None else window - 1
    attended: torch.Tensor = _forward(query, key, value, bounds, longest, scale, before)[0]
    return attended
