"""Copying and adding between tensors of different types on a GPU, at the speed of its memory.

torch's own kernels for mixed types (2.11, 2026-11) reach a third of it on an H200, and converting first takes a copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096
"""Elements that one program of the grid handles."""


def cast_into(target: torch.Tensor, source: torch.Tensor, *, add: bool = False, factor: float = 1.0) -> None:
    """As `casting.cast_into`."""
    size = target.numel()
    if size:
        _cast[(triton.cdiv(size, BLOCK),)](target, source, size, factor=factor, add=add, block=BLOCK)


@triton.jit
def _cast(target, source, size, factor: tl.constexpr, add: tl.constexpr, block: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = places < size
    value = tl.load(source + places, mask=inside)
    if factor != 1:
        value = value.to(tl.float32) * factor
    value = value.to(target.dtype.element_ty)
    if add:
        value += tl.load(target + places, mask=inside)
    tl.store(target + places, value, mask=inside)
