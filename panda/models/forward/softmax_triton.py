"""Softmax of logits in 16 bits on a GPU: its normaliser, and the gradient of the cross-entropy in their place.

With torch's kernels (2.11, 2026-11) a part of the logits is read or written eleven times, mostly as float32. Here it is
read once for the normaliser, and read and written once for the gradient, in its own type; between, all is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096
"""Logits that a program handles at once."""


def normaliser(logits: torch.Tensor) -> torch.Tensor:
    """float32 [rows, 1]: the logarithm of the sum of the exponentials of each row of ``logits`` [rows, entries]."""
    rows, entries = logits.shape
    result = torch.empty(rows, 1, dtype=torch.float32, device=logits.device)
    _normaliser[(rows,)](logits, result, entries, block=BLOCK, num_warps=8)
    return result


def gradient_in_place(
    logits: torch.Tensor,
    normaliser: torch.Tensor,
    label: torch.Tensor,
    at_label: torch.Tensor,
    weights: torch.Tensor | None,
    spread: float,
) -> torch.Tensor:
    """``(exp(logits - normaliser) - spread - at_label at the label) * weights``, rounded, in the memory of ``logits``.

    ``logits`` is [rows, entries], contiguous; the others are [rows, 1]: ``label`` int64, and the rest float32.
    """
    rows, entries = logits.shape
    columns = triton.cdiv(entries, BLOCK)
    has_weights = weights is not None
    _gradient[(rows, columns)](
        *(logits, normaliser, label, at_label, weights if has_weights else at_label, entries, spread),
        has_weights=has_weights,
        block=BLOCK,
        num_warps=8,
    )
    return logits


@triton.jit
def _normaliser(logits, result, entries, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest, total = -3.4e38, 0.0  # from -inf, a block of -inf alone would give NaN
    for start in range(0, entries, block):
        places = start + tl.arange(0, block)
        value = tl.load(logits + row * entries + places, mask=places < entries, other=-float("inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(value, 0))
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(value - above), 0)
        largest = above
    tl.store(result + row, largest + tl.log(total))


@triton.jit
def _gradient(
    logits, normaliser, label, at_label, weights, entries, spread, has_weights: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * block + tl.arange(0, block)
    inside = places < entries
    value = tl.load(logits + row * entries + places, mask=inside, other=0.0).to(tl.float32)
    value = tl.exp(value - tl.load(normaliser + row)) - spread
    value -= tl.where(places == tl.load(label + row), tl.load(at_label + row), 0.0)
    if has_weights:
        value *= tl.load(weights + row)
    tl.store(logits + row * entries + places, value.to(logits.dtype.element_ty), mask=inside)
