"""The layout of an optimizer that steps whole parameters in one process: the layout until ``bind`` gives another."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import torch

from panda.registry.contexts import ParameterDescription
from panda.registry.contexts import ParameterLayout
from panda.registry.contexts import Segment
from panda.registry.contexts import TensorLayout


def unsharded(groups: list[dict[str, Any]]) -> ParameterLayout:
    """Each tensor in ``groups`` is a parameter, named by its number."""
    tensors = [tensor for group in groups for tensor in group["params"]]
    return ParameterLayout(
        tuple(
            TensorLayout(tensor, (str(number),), (Segment(0, 0, tensor.numel(), 0),))
            for number, tensor in enumerate(tensors)
        ),
        lambda sums: sums,
        {str(number): ParameterDescription(str(number), tuple(t.shape), _kind(t)) for number, t in enumerate(tensors)},
        _Alone(),
    )


def _kind(tensor: torch.Tensor) -> Any:
    return {0: "vector", 1: "vector", 2: "matrix"}.get(tensor.dim(), "tensor")


class _Alone:
    """One process has everything."""

    def gather(
        self, tensors: Sequence[TensorLayout], values: Sequence[torch.Tensor], names: Collection[str] | None
    ) -> dict[str, torch.Tensor]:
        pairs = zip(tensors, values, strict=True)
        return {layout.parameters[0]: v for layout, v in pairs if names is None or layout.parameters[0] in names}

    def scatter(
        self,
        tensors: Sequence[TensorLayout],
        wholes: Mapping[str, torch.Tensor],
        names: Collection[str] | None,
        dtype: torch.dtype | None,
    ) -> list[torch.Tensor]:
        dtype = dtype or torch.float32
        return [
            wholes[layout.parameters[0]].to(dtype)
            if names is None or layout.parameters[0] in names
            else torch.zeros_like(layout.tensor, dtype=dtype)
            for layout in tensors
        ]
