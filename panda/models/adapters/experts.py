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


def written_names(model: torch.nn.Module, targets: Iterable[str]) -> list[str]:
    """What users write for the parameters of ``model`` that ``targets``, ends of names as peft has them, name.

    Experts by the last two parts of their names (``experts.down_proj``), routers as layers (``gate``).
    """
    experts = expert_parameters(model)
    ends = tuple(f".{target}" for target in targets)
    named = (name for name, _ in model.named_parameters() if f".{name}".endswith(ends))
    return sorted({".".join(name.split(".")[slice(-2, None if name in experts else -1)]) for name in named})
