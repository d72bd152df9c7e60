"""The experts of a mixture: parameters that hold a matrix for each expert, in place of linear layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from panda.weights.stored_tensor import whole_shape


def expert_parameters(model: torch.nn.Module) -> dict[str, int]:
    """The parameters of ``model`` that are [experts, rows, columns], with their numbers of elements, by full name.

    Biases of the experts, and the kernels of convolutions, are not among them.
    """
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, torch.nn.modules.conv._ConvNd):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            shape = whole_shape(parameter)
            if len(shape) == 3:
                found[f"{prefix}.{name}" if prefix else name] = torch.Size(shape).numel()
    return found


def ends_of_experts(model: torch.nn.Module) -> list[str]:
    """The last two parts of the names of these parameters, each once, by which users name them."""
    return sorted({".".join(name.split(".")[-2:]) for name in expert_parameters(model)})


def named_experts(model: torch.nn.Module, targets: Iterable[str]) -> list[str]:
    """Those of ``targets``, full names or ends of names, that name parameters of experts of ``model``."""
    experts = expert_parameters(model)
    return [target for target in targets if any(n == target or n.endswith(f".{target}") for n in experts)]
