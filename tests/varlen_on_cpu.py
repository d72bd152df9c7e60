"""A kernel for a CPU under torch's varlen_attn and in place of FlashAttention 4: each sample by itself, in plain torch.

Everything above it is as on a GPU: varlen_attn and its checks, autograd functions, and what torch.compile sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from panda.models.forward import flash_attention_4


@contextmanager
def varlen_on_cpu() -> Iterator[list[int]]:
    """In the meantime both kernels work on a CPU. Yields the number of samples of each call."""
    calls: list[int] = []

    def forward(
        query: Any, key: Any, value: Any, bounds: Any, bounds_k: Any, max_q: int, max_k: int, dropout: float,
        causal: bool, debug: bool, **keywords: Any,
    ) -> Any:  # fmt: skip
        calls.append(len(bounds) - 1)
        out = torch.empty_like(query)
        for part, _scale, probable, _, v in _samples(
            query, key, value, bounds, bounds_k, max_q, max_k, dropout, causal, **keywords
        ):
            out[part] = (probable @ v).transpose(0, 1)
        nothing = torch.empty(0)
        return out, torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64), nothing, nothing

    def backward(
        grad: Any, query: Any, key: Any, value: Any, out: Any, total: Any, bounds: Any, bounds_k: Any, max_q: int,
        max_k: int, dropout: float, causal: bool, state: Any, unused: Any, **keywords: Any,
    ) -> Any:  # fmt: skip
        grads = [torch.empty_like(each) for each in (query, key, value)]
        for part, scale, probable, k, v in _samples(
            query, key, value, bounds, bounds_k, max_q, max_k, dropout, causal, **keywords
        ):
            of_out, q = grad[part].transpose(0, 1), query[part].transpose(0, 1)
            of_probable = of_out @ v.transpose(1, 2)
            of_scores = scale * probable * (of_probable - (of_probable * probable).sum(-1, keepdim=True))
            found = of_scores @ k, of_scores.transpose(1, 2) @ q, probable.transpose(1, 2) @ of_out
            for gradient, each in zip(grads, found, strict=True):  # queries that share a key add up
                shared = each.unflatten(0, (gradient.shape[1], -1)).sum(1)
                gradient[part] = shared.transpose(0, 1)
        return tuple(grads)

    def forward_4(
        query: Any, key: Any, value: Any, *, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
        max_seqlen_k: int, softmax_scale: float | None, causal: bool, window_size_left: int | None, return_lse: bool,
    ) -> Any:  # fmt: skip
        assert causal and return_lse
        given = query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, False
        out, total, *_ = forward(*given, scale=softmax_scale, **_window(window_size_left))
        return out.contiguous(), total, None, None, None

    def backward_4(
        query: Any, key: Any, value: Any, out: Any, grad: Any, total: Any, *, softmax_scale: float | None,
        causal: bool, window_size_left: int | None, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
        max_seqlen_k: int, deterministic: bool,
    ) -> Any:  # fmt: skip
        assert deterministic == torch.are_deterministic_algorithms_enabled() and grad.is_contiguous()
        given = grad, query, key, value, out, total, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal
        return backward(*given, None, None, scale=softmax_scale, **_window(window_size_left))

    kernels, before = SimpleNamespace(_flash_attn_fwd=forward_4, _flash_attn_bwd=backward_4), flash_attention_4._kernels
    flash_attention_4._kernels = lambda: kernels  # type: ignore[assignment]
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield calls
    finally:
        library._destroy()
        flash_attention_4._kernels = before  # type: ignore[assignment]


def _window(before: int | None) -> dict[str, int]:
    """That of FlashAttention 4, causal and with so many tokens ``before`` one, as torch's operation takes it."""
    return {"window_size_left": -1 if before is None else before, "window_size_right": 0}


def _samples(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, bounds_k: torch.Tensor,
    max_q: int, max_k: int, dropout: float, causal: bool,
    scale: float | None = None, window_size_left: int = -1, window_size_right: int = -1, **_: Any,
) -> Iterator[tuple[slice, float, torch.Tensor, torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Of each sample: its tokens, the scale, probabilities [heads, tokens, tokens], keys and values of all heads."""
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    assert bounds.dtype == bounds_k.dtype == torch.int32 and torch.equal(bounds, bounds_k) and not dropout
    assert bounds[0] == 0 and bounds[-1] == len(query) == len(key)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    repeats = query.shape[1] // key.shape[1]
    for start, end in pairwise(bounds.tolist()):
        assert 0 <= end - start <= max_q == max_k, "the kernel would leave tokens out"
        behind = torch.arange(end - start).unsqueeze(1) - torch.arange(end - start)
        seen = torch.ones_like(behind, dtype=torch.bool)
        if causal or window_size_right >= 0:
            seen &= behind >= -max(window_size_right, 0)
        if window_size_left >= 0:
            seen &= behind <= window_size_left
        q, k, v = (each[start:end].transpose(0, 1) for each in (query, key, value))
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        yield slice(start, end), scale, scores.softmax(-1), k, v
