"""Weights from disk to where they belong: a device, or a rank's share of them under ZeRO-3."""

from __future__ import annotations

from typing import Any

import torch

from panda.engine.processes import Processes
from panda.weights.stored_tensor import Weights
from panda.weights.stored_tensor import put


def place(module: torch.nn.Module, weights: Weights, config: dict[str, Any], processes: Processes) -> None:
    """Give each parameter of ``module``, which are on the meta device, and each of its buffers the tensor of its name.

    One tensor at a time, in the type of DeepSpeed's ``config``. Under ZeRO-3 rank 0 reads it, every
    rank keeps its share, and none ever holds more than its share and one tensor; in the other stages
    every rank reads. Every rank has to call it.
    """
    import deepspeed

    partitions = config["zero_optimization"]["stage"] == 3
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float16 if config["fp16"]["enabled"] else None
    targets: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
    for name, stored in weights.items():
        target = targets[name]
        if not isinstance(target, torch.nn.Parameter):
            target.copy_(stored.read())
            continue
        kind = dtype if dtype and target.is_floating_point() else target.dtype
        if partitions and processes.rank > 0:
            value = torch.empty(target.shape, dtype=kind, device=processes.device)  # rank 0 sends it
        else:
            value = stored.read().to(processes.device, kind, copy=True)
        parameter = put(module, name, value)
        del value
        if partitions:
            deepspeed.zero.Init(module=torch.nn.ParameterList([parameter]), config_dict_or_path=config)
    empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    assert not empty, f"no weights for {empty}"
