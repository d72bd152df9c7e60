"""Other weights beside the trained ones, such as an average of them, held and used as the engine holds its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from panda.engine.parameter_layouts import check_values
from panda.engine.parameter_layouts import read_layout
from panda.registry.contexts import Segment
from panda.registry.contexts import TensorLayout

if TYPE_CHECKING:
    from panda.engine.engine import Engine


class WeightsCopy:
    """A copy of the trained weights, in fp32: of each tensor that the optimizer steps on this rank.

    Under ZeRO 1 to 3 that is this rank's part of the master weights, with some padding: arithmetic on it has to go
    element by element.
    """

    def __init__(self, layouts: list[TensorLayout], tensors: list[torch.Tensor]) -> None:
        self.layouts = layouts
        self.tensors = tensors
        """What is copied, in the order of ``trained``: a plugin may change it in place."""

    @property
    def trained(self) -> list[torch.Tensor]:
        """The trained weights as they are now, in the same order and shapes: to read."""
        return [layout.tensor.detach() for layout in self.layouts]

    @torch.no_grad()
    def move_towards_trained(self, share: float) -> None:
        """Move each weight by ``share`` of its distance to the trained one: with 1 - d, an average that decays by d."""
        for tensor, trained in zip(self.tensors, self.trained, strict=True):
            tensor.lerp_(trained.to(tensor), share)


def copy_weights(engine: Engine) -> WeightsCopy:
    """A copy of the weights that ``engine`` trains. Takes as much memory as its master weights do.

    Raises UserError where DeepSpeed holds them in a way that panda does not know.
    """
    _, layouts = read_layout(engine.module, engine.optimizer)
    check_values(engine.module, layouts)
    return WeightsCopy(layouts, [layout.tensor.detach().to(torch.float32, copy=True) for layout in layouts])


@contextmanager
def using(engine: Engine, copied: WeightsCopy | None) -> Iterator[None]:
    """In the meantime the model has the weights of ``copied``; then it has its own again, to the bit. None: its own.

    Every rank has to open it. Nothing may be trained or saved in it.
    """
    if copied is None:
        yield
        return
    other = [replace(layout, tensor=tensor) for layout, tensor in zip(copied.layouts, copied.tensors, strict=True)]
    if engine.optimizer is engine.own_optimizer:  # its tensors are the weights of the model: nothing is wrapped
        _exchange(copied)
        try:
            yield
        finally:
            _exchange(copied)
        return
    set_weights(engine, other)
    try:
        yield
    finally:
        set_weights(engine, copied.layouts)


@torch.no_grad()
def _exchange(copied: WeightsCopy) -> None:
    """Exchange the contents of ``copied`` and of the trained weights, a tensor at a time."""
    for tensor, trained in zip(copied.tensors, copied.trained, strict=True):
        held = trained.clone()
        trained.copy_(tensor)
        tensor.copy_(held)


@torch.no_grad()
def set_weights(engine: Engine, masters: list[TensorLayout]) -> None:
    """Set each trained weight of the module, in the type of the forward pass, from the ranks' parts in ``masters``."""
    if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        engine.take_partitions_from(masters)
        return
    wrapper, _ = read_layout(engine.module, engine.optimizer)
    parts: dict[str, list[tuple[torch.Tensor, Segment]]] = defaultdict(list)
    for layout in masters:
        for segment in layout.segments:
            parts[layout.parameters[segment.parameter]].append((layout.tensor.detach().view(-1), segment))
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        whole = torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
        for tensor, segment in parts[name]:
            whole[segment.source : segment.source + segment.length] = tensor[
                segment.start : segment.start + segment.length
            ].to(whole)
        if wrapper.partitioned:
            # Each element is on one rank, and 0 on the others. As bytes, the sum keeps the sign of a zero.
            engine.processes.sum_(whole.view(torch.uint8))
        parameter.copy_(whole.view_as(parameter))
