"""Copying and adding between tensors of different types, in one pass over memory where a GPU can do so."""

from __future__ import annotations

import torch

from panda.files.compilers import can_compile


def cast_into(target: torch.Tensor, source: torch.Tensor, *, add: bool = False, factor: float = 1.0) -> None:
    """Set ``target`` [elements] to ``factor`` times ``source`` [elements], or ``add`` that, in target's type.

    Both are contiguous.
    """
    if target.is_cuda and can_compile(target.device):
        from panda.engine.casting_triton import cast_into as by_kernel

        by_kernel(target, source, add=add, factor=factor)
    elif add:
        target.add_(source, alpha=factor)
    else:
        target.copy_(source)
        if factor != 1:
            target.mul_(factor)
