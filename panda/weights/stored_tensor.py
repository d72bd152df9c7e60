"""Tensors by name that are read on demand: what readers of weights return, and placing and writing accept."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace

import torch


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is read on demand and not kept."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    """Returns the tensor, on the CPU, or a random one where it was drawn. It may be a view of a file: copy it before
    changing it."""


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of the whole ``tensor``, of which a rank has a part under ZeRO-3 and tensor parallelism."""
    found: tuple[int, ...] = tuple(getattr(tensor, "whole_shape", getattr(tensor, "ds_shape", tensor.shape)))
    return found


Places = list[tuple[torch.nn.Module, str]]
"""The modules that hold one parameter, and the attributes under which they do."""


def places_of(module: torch.nn.Module) -> dict[str, Places]:
    """Where each parameter of ``module`` is held, by each of its names."""
    held: dict[int, Places] = {}
    for holder in module.modules():
        for attribute, parameter in holder._parameters.items():
            held.setdefault(id(parameter), []).append((holder, attribute))
    return {name: held[id(parameter)] for name, parameter in module.named_parameters(remove_duplicate=False)}


def put(places: Places, value: torch.Tensor) -> torch.nn.Parameter:
    """Replace the parameter at ``places`` by one with ``value``, and return the new one."""
    holder, attribute = places[0]
    old = getattr(holder, attribute)
    new = torch.nn.Parameter(value, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    for holder, attribute in places:
        setattr(holder, attribute, new)  # not into _parameters: an RNN keeps its own lists of parameters
    return new


Weights = Mapping[str, StoredTensor]
"""Every tensor of a model, by name, in the order of the file or the module."""


def counted(weights: Weights, note: Callable[[int], None]) -> Weights:
    """``weights``; ``note`` is called with the bytes of each tensor when it has been read."""

    def counting(stored: StoredTensor) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            tensor = stored.read()
            note(_bytes(stored))
            return tensor

        return read

    return {name: replace(stored, read=counting(stored)) for name, stored in weights.items()}


def bytes_of(weights: Weights) -> int:
    """Bytes of all ``weights``."""
    return sum(map(_bytes, weights.values()))


def _bytes(stored: StoredTensor) -> int:
    return math.prod(stored.shape) * stored.dtype.itemsize


def weights_of(module: torch.nn.Module) -> Weights:
    """The parameters and persistent buffers that ``module`` has now, under their first names."""
    weights: dict[str, StoredTensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            weights[name] = StoredTensor(tuple(tensor.shape), tensor.dtype, tensor.detach)
        seen.add(id(tensor))
    return weights
