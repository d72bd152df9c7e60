"""The linear layers of a model: what adapters are put on, and what is quantised."""

from __future__ import annotations

import torch


def linear_names(model: torch.nn.Module) -> list[str]:
    """The full name of each linear layer of ``model``, in its order."""
    return [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and not _routes(module)
    ]


def has_linear_routers(model: torch.nn.Module) -> bool:
    """Whether some layers of ``model`` are linear only by their class: see ``_routes``."""
    return any(isinstance(module, torch.nn.Linear) and _routes(module) for module in model.modules())


def _routes(module: torch.nn.Module) -> bool:
    """Whether ``module`` is the router of a mixture of experts: Llama4Router and PhimoeTopKRouter of transformers
    (5.23, 2026-11) are subclasses of the linear layer that return several tensors, which peft takes for one."""
    return "Router" in type(module).__name__


def adaptable_names(model: torch.nn.Module) -> list[str]:
    """The same with the layers of GPT-2 and models after it, which transformers calls Conv1D."""
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and not _routes(module)]


def listed_names(model: torch.nn.Module) -> str:
    """The last parts of the names of the layers of ``model`` that can be adapted, each once, for a message."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in adaptable_names(model)})) or "no linear layer"
