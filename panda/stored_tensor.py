"""Tensors by name that are somewhere on disk: what readers of weights return, and placing and writing take."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is read when it is wanted, and not kept."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    """The tensor, on the CPU. It may be a view of a file: copy before changing it."""


Weights = Mapping[str, StoredTensor]
"""Every tensor of a model, by name, in the order of the file or the module."""
