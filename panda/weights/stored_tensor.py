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


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of ``tensor`` on all ranks together: under ZeRO-3 and tensor parallelism a rank has a part of it."""
    found: tuple[int, ...] = tuple(getattr(tensor, "whole_shape", getattr(tensor, "ds_shape", tensor.shape)))
    return found


def put(module: torch.nn.Module, name: str, value: torch.Tensor) -> torch.nn.Parameter:
    """Have ``module`` hold ``value`` as its parameter ``name``, and wherever else it has that; the new parameter."""
    old = module.get_parameter(name)
    new = torch.nn.Parameter(value, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    for holder in module.modules():
        for attribute, parameter in list(holder._parameters.items()):
            if parameter is old:
                setattr(holder, attribute, new)  # and not in _parameters: an RNN keeps lists of its own
    return new


Weights = Mapping[str, StoredTensor]
"""Every tensor of a model, by name, in the order of the file or the module."""


def weights_of(module: torch.nn.Module) -> Weights:
    """The parameters and persistent buffers that ``module`` has now, under their first names."""
    weights: dict[str, StoredTensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            weights[name] = StoredTensor(tuple(tensor.shape), tensor.dtype, tensor.detach)
        seen.add(id(tensor))
    return weights
