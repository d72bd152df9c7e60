"""FairScale's layers with sums over ranks that torch compiles, and that write over nothing.

FairScale 0.4.13 sums a product over ranks in place (`mappings.py`), which torch 2.13 does not trace, and which would be
done twice where a stored product is used again (`activation_checkpointing: selective`).
"""

from __future__ import annotations

from typing import Any

import torch
from fairscale.nn.model_parallel.layers import ColumnParallelLinear
from fairscale.nn.model_parallel.layers import RowParallelLinear


class _SumGradient(torch.autograd.Function):
    """A tensor that is the same on all ranks of ``group``, each of which computes a part of what follows from it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _summed(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the ranks of ``group``, which all go on with it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        return _summed(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _sum_gradient(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    result: torch.Tensor = _SumGradient.apply(tensor, group)  # type: ignore[no-untyped-call]
    return result


def _summed(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum of ``tensor`` over the ranks of ``group``, in memory of its own.

    By torch's operations for compiled code, which then calls them itself. `all_reduce` of torch.distributed is traced
    as a write to its tensor, and torch 2.11 takes the result of the function around it for one without a gradient:
    layers were not trained (2026-11-27). Around it, an operation in Python took a fifth of the host's time.
    """
    total = torch.ops._c10d_functional.all_reduce(tensor, "sum", group.group_name)
    result: torch.Tensor = torch.ops._c10d_functional.wait_tensor(total)
    return result


class Column(ColumnParallelLinear):  # type: ignore[misc]
    """A linear layer of which each rank of ``group`` computes a part of the outputs."""

    group: Any = None
    sums_gradient = True
    """Whether the gradient of its input is summed over ranks here, and not for a block of such layers."""

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        whole = _sum_gradient(input_, self.group) if self.sums_gradient else input_
        return torch.nn.functional.linear(whole, self.weight, self.bias)


class Row(RowParallelLinear):  # type: ignore[misc]
    """A linear layer that is given a part of its inputs on each rank of ``group``."""

    group: Any = None

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        product = torch.nn.functional.linear(input_, self.weight)
        output: torch.Tensor = _Sum.apply(product, self.group)  # type: ignore[no-untyped-call]
        return output if self.bias is None else output + self.bias


def sum_gradient_once(block: torch.nn.Module, group: Any) -> None:
    """Sum the gradients of the inputs of ``block``, once for all of the ``Column`` layers to which alone they go."""

    def share(
        _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def shared(value: Any) -> Any:
            return _sum_gradient(value, group) if isinstance(value, torch.Tensor) and value.requires_grad else value

        return tuple(map(shared, args)), {name: shared(value) for name, value in kwargs.items()}

    block.register_forward_pre_hook(share, with_kwargs=True)
    for layer in block.modules():
        if isinstance(layer, Column):
            layer.sums_gradient = False
