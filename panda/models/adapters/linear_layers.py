"""The linear layers of a model: what adapters are put on, and what is quantised."""

from __future__ import annotations

import torch


def linear_names(model: torch.nn.Module) -> list[str]:
    """The full name of each linear layer of ``model``, in its order."""
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def listed_names(model: torch.nn.Module) -> str:
    """The last parts of the names of the linear layers of ``model``, each once, for a message."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in linear_names(model)})) or "no linear layer"
