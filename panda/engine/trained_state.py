"""The part of a model that training changes, by name: what checkpoints have of it."""

from __future__ import annotations

import torch

from panda.registry import UserError


def trained_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The part of the state dict of ``module`` that training changes: parameters that are not frozen, and buffers."""
    state: dict[str, torch.Tensor] = {
        name: p for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    for prefix, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                state[f"{prefix}.{name}" if prefix else name] = buffer
    return state


@torch.no_grad()
def load_trained_state(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """Copy ``src`` to the tensors of ``dst`` of the same names. DeepSpeed passes these two arguments by name."""
    state = trained_state(dst)
    if src.keys() != state.keys():
        differing = ", ".join(sorted(src.keys() ^ state.keys())[:5])
        raise UserError(f"the checkpoint is of another model: only one of the two has {differing}.")
    for name, tensor in state.items():
        tensor.copy_(src[name])
