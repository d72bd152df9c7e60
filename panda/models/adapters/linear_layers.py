"""The linear layers of a model: what adapters are put on, and what is quantised."""

from __future__ import annotations

import torch


def linear_names(model: torch.nn.Module) -> list[str]:
    """The full name of each linear layer of ``model``, in its order."""
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def adaptable_names(model: torch.nn.Module) -> list[str]:
    """The same with the layers of GPT-2 and models after it, which transformers calls Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]


def listed_names(model: torch.nn.Module) -> str:
    """The last parts of the names of the layers of ``model`` that can be adapted, each once, for a message."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in adaptable_names(model)})) or "no linear layer"
