"""The parameter groups of a module: the one place that decides them."""

from __future__ import annotations

import re
from typing import Any

import torch


def param_groups(module: torch.nn.Module, *, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """One group a layer, in the order of the module; every parameter is decayed, as `weight_decay` promises.

    A layer is what shares a name up to its first number: ``model.layers.0``. ZeRO-1 and 2 make an
    fp32 copy of the gradients of one group at a time during the step; with one group for the whole
    model that copy is as large as the model (25 GiB at 7B, measured).
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            layer = re.match(r"([^.]+\.)*?\d+(?=\.|$)", name)
            key = layer.group() if layer else ""
            group = groups.setdefault(key, {"params": [], "lr": learning_rate, "weight_decay": weight_decay})
            group["params"].append(parameter)
    return list(groups.values())
