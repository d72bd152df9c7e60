"""Creating modules without weights, where those come from a checkpoint; and keeping computed buffers in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made inside it have their parameters on the meta device: nothing is stored or initialised.

    Buffers are made as usual, since most are computed and not in a checkpoint. A parameter with several names
    stays one parameter.
    """
    register = torch.nn.Module.register_parameter

    def register_empty(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            empty = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            torch.utils.swap_tensors(parameter, empty)  # type: ignore[no-untyped-call]
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_empty  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def keep_computed_float32(model: torch.nn.Module) -> None:
    """Keep the type of the buffers in modules of ``model`` that hold only computed buffers, when it is cast to 16 bits.

    DeepSpeed (0.19, 2026-11) casts whole models, and with them the frequencies of a rotary embedding: positions past
    a few hundred then share angles, and the trained model differs from its export, which transformers loads
    with frequencies in float32.
    """
    for module in model.modules():
        buffers = set(module._buffers)
        if buffers and buffers <= module._non_persistent_buffers_set and not module._parameters:
            _keep_float32(module)


def _keep_float32(module: torch.nn.Module) -> None:
    apply: Any = module._apply

    def move_only(convert: Any, recurse: bool = True) -> torch.nn.Module:
        moved: torch.nn.Module = apply(lambda tensor: tensor.to(convert(tensor).device), recurse)
        return moved

    module._apply = move_only  # type: ignore[method-assign]
