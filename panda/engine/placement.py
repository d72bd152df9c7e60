"""Moves weights from disk to their place: a device, or under ZeRO-3 each rank's share."""

from __future__ import annotations

from typing import Any

import torch

from panda.configuration.options import RunOptions
from panda.engine.processes import Processes
from panda.weights.stored_tensor import Weights
from panda.weights.stored_tensor import places_of
from panda.weights.stored_tensor import put


def place(
    module: torch.nn.Module, weights: Weights, options: RunOptions, config: dict[str, Any], processes: Processes
) -> None:
    """Give every parameter of ``module`` and every buffer the tensor of its name.

    Parameters are on the meta device, or have these tensors already: then they are copied only if they have to move.
    One tensor at a time, in the precision of ``options``; ``config`` is DeepSpeed's. Under ZeRO-3 rank 0 reads it,
    each rank keeps its share, and none ever holds more than its share and one tensor; in the other stages every rank
    reads. Every rank must call this.
    """
    import deepspeed

    partitions = options.zero == 3
    dtype = None if options.precision == "fp32" else getattr(torch, options.dtype_name)
    targets: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
    places = places_of(module)
    for name, stored in weights.items():
        target = targets[name]
        if not isinstance(target, torch.nn.Parameter):
            target.copy_(stored.read())
            continue
        kind = dtype if dtype and target.is_floating_point() else target.dtype
        if partitions and processes.rank > 0:
            value = torch.empty(target.shape, dtype=kind, device=processes.device)  # rank 0 sends it
        else:
            value = stored.read()
            is_in_module = value.data_ptr() == target.data_ptr()
            value = value.to(processes.device, kind, copy=not is_in_module)
        parameter = put(places[name], value)
        del value
        if partitions:
            # `zero.Init` of DeepSpeed 0.19.8 partitions modules, not tensors: hence a list of one. Can go when it
            # takes a parameter.
            deepspeed.zero.Init(module=torch.nn.ParameterList([parameter]), config_dict_or_path=config)
    empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    assert not empty, f"no weights for {empty}"
