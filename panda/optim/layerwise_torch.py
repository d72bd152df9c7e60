"""NVLAMB's arithmetic in torch's own operations: on any device, in fp32 and in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adamw import adamw

from panda.registry.contexts import TensorLayout

NORM_ROW = 4096
"""On the CPU, the squares of so many elements are summed in fp32, and these sums in float64."""


def replace_gradients(layouts: list[TensorLayout], states: list[dict[str, Any]], group: dict[str, Any]) -> torch.Tensor:
    """Replace each gradient by the update u, and update the moments.

    ``step`` in ``states`` is the number of steps before this one. Returns float64 [segments of all, 2]:
    the squared norms of the weights and of the updates.
    """
    weights, gradients, means, squares = ([] for _ in range(4))
    steps = []
    for layout, state in zip(layouts, states, strict=True):
        weights += _stretches(layout, layout.tensor)
        gradients += _stretches(layout, _gradient(layout.tensor))
        means += _stretches(layout, state["exp_avg"])
        squares += _stretches(layout, state["exp_avg_sq"])
        steps += [float(state["step"])] * len(layout.segments)
    device = layouts[0].tensor.device
    if not weights:
        return torch.zeros(0, 2, dtype=torch.float64, device=device)
    beta1, beta2 = group["betas"]
    # torch's fused kernel, given the gradient as the weight too. With a rate and a decay of -1 it
    # computes g - (-1)(-1) g + m / (sqrt(v) + eps), whose first two terms cancel exactly. This takes
    # one pass over memory, and no new memory.
    adamw(
        gradients,
        gradients,
        means,
        squares,
        [],
        [torch.full((), step, device=device) for step in steps],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=-1.0,
        weight_decay=-1.0,
        eps=group["eps"],
        maximize=False,
    )
    if group["weight_decay"] != 0:
        torch._foreach_add_(gradients, weights, alpha=group["weight_decay"])
    return torch.stack([_squared_norms(weights), _squared_norms(gradients)], dim=1)


def move(layouts: list[TensorLayout], rate: float, factors: torch.Tensor) -> None:
    """Move each segment's weights by its update, times ``-rate`` and its one of ``factors`` [segments of all].

    Sets the updates to zero: where DeepSpeed keeps gradients in a buffer, the gradient of a parameter
    that the next step does not use stays as it is, and must not be the update of this step.
    """
    weights = [stretch for layout in layouts for stretch in _stretches(layout, layout.tensor)]
    updates = [stretch for layout in layouts for stretch in _stretches(layout, _gradient(layout.tensor))]
    for weight, update, factor in zip(weights, updates, factors.to(layouts[0].tensor.dtype), strict=True):
        weight.addcmul_(update, factor, value=-rate)
    if updates:
        torch._foreach_zero_(updates)


def _gradient(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _stretches(layout: TensorLayout, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The segments of ``tensor``, which has this layout. The padding between them is not touched: if a sub-group of
    ZeRO-3 has one parameter, its gradient is the buffer whose norm DeepSpeed takes, padding included."""
    return [
        tensor  # of any shape and strides
        if segment.length == tensor.numel()
        else tensor.narrow(0, segment.start, segment.length)
        for segment in layout.segments
    ]


def _squared_norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    """float64 [len(tensors)]."""
    if not tensors[0].is_cpu:
        return torch.stack(torch._foreach_norm(tensors, dtype=torch.float64)).square()
    # On the CPU, torch 2.13 (2026-11) adds up fp32 squares one after another, which is off by 3e-3 for a
    # matrix of LLaMA-7B. With dtype=float64 it is right, but twenty times slower than fp32 sums of rows,
    # summed in float64. This can go when torch sums pairwise, or in float64 at the speed of fp32.
    return torch.stack([_squared_norm(tensor.reshape(-1)) for tensor in tensors])


def _squared_norm(flat: torch.Tensor) -> torch.Tensor:
    whole = flat.numel() // NORM_ROW * NORM_ROW
    rows: torch.Tensor = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_ROW), dim=1)
    return rows.double().square().sum() + flat[whole:].double().square().sum()
