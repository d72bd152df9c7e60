"""NVLAMB's arithmetic in torch's own operations: on any device, in fp32 and in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adamw import adamw

from panda.registry.contexts import TensorLayout

NORM_ROW = 4096
"""Elements that are summed in fp32 before the sums are summed in float64, on the CPU."""


def replace_gradients(layouts: list[TensorLayout], states: list[dict[str, Any]], group: dict[str, Any]) -> torch.Tensor:
    """Put the update u in the place of each gradient, and move the moments on.

    ``states`` have ``step`` as it was before. Returns float64 [segments of all, 2]: the squared norms
    of the weights and of the updates.
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
    # torch's fused kernel, with the gradient in the place of the weight too. A rate and a decay of
    # -1 make of it g - (-1)(-1) g + m / (sqrt(v) + eps), and the first two are 0, exactly: one pass
    # over memory, and none of it new.
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

    Updates are zero afterwards: the gradient of a parameter that a step does not use stays what it was
    where DeepSpeed keeps it in a buffer, and must not be the update of the step before.
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
    """The segments of ``tensor``, which is laid out so. What lies between them is DeepSpeed's, and is not touched:
    with one parameter in a sub-group, the gradient of ZeRO-3 is the buffer whose norm it takes, padding included."""
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
    # On the CPU torch sums one fp32 after another: off by 3e-3 at the size of a LLaMA-7B matrix. Asked
    # for float64 it is right, and twenty times slower than rows of fp32 sums, summed in float64.
    return torch.stack([_squared_norm(tensor.reshape(-1)) for tensor in tensors])


def _squared_norm(flat: torch.Tensor) -> torch.Tensor:
    whole = flat.numel() // NORM_ROW * NORM_ROW
    rows: torch.Tensor = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_ROW), dim=1)
    return rows.double().square().sum() + flat[whole:].double().square().sum()
