"""Metrics of a task: pairs of a numerator and a denominator, added up over micro batches and ranks on the device; and
that ranks agree on what is added up, statistics too."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch

from panda.engine.processes import Processes
from panda.registry import UserError
from panda.registry.contexts import Loss


def loss_of(returned: Loss | torch.Tensor, *, idle: bool) -> Loss:
    """What a task ``returned`` for a batch, without graph but for the sum; times 0 where the batch is ``idle``."""
    found = returned if isinstance(returned, Loss) else Loss(returned)
    if not idle:
        return found
    return Loss(found.sum * 0, dict.fromkeys(found.metrics, (0.0, 0.0)))


def refuse_loss(returned: Any, whose: str) -> None:
    """Raise UserError where ``returned``, by the ``loss`` of a task of ``whose``, is no loss."""
    found = returned if isinstance(returned, Loss) else Loss(returned)
    wrong = None
    if not isinstance(found.sum, torch.Tensor):
        wrong = f"`loss` returned {found.sum!r:.60}, and not a tensor"
    elif found.sum.ndim:
        wrong = f"`loss` returned a tensor of the shape {list(found.sum.shape)}, and not a sum"
    elif torch.is_grad_enabled() and not found.sum.requires_grad:
        wrong = "`loss` returned a tensor without a gradient: nothing would be trained"
    else:
        for name, pair in found.metrics.items():
            if not (isinstance(pair, tuple) and len(pair) == 2 and all(map(_is_one_number, pair))):
                wrong = f"the metric {name!r} of its `loss` is {pair!r:.60}, and not a numerator and a denominator"
    if wrong:
        raise UserError(
            f"task: {wrong}. Return the scalar tensor of the sum, or `Loss(sum, {{name: (numerator, denominator)}})`"
            f" with scalar tensors or numbers. This is a fault of {whose}."
        )


def _is_one_number(value: Any) -> bool:
    return not value.ndim if isinstance(value, torch.Tensor) else isinstance(value, Real)


class MetricSums:
    """The sums of all metrics of some batches."""

    def __init__(self, dtype: torch.dtype, device: torch.device, names: Iterable[str] | None = None) -> None:
        """``names``: those that every batch has to have; None for those of the first one."""
        self.dtype, self.device = dtype, device
        self.names = None if names is None else tuple(sorted(names))
        """In order; None where they are not known before the first batch."""
        self._parts: list[torch.Tensor] = []

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Add the metrics of a batch. Raises UserError where their names are others than before."""
        names = tuple(sorted(metrics))
        if self.names is not None and names != self.names:
            raise UserError(
                f"task: its metrics are {', '.join(self.names) or 'none'}, as it states or as they were before, and of"
                f" another batch {', '.join(names) or 'none'}. Return the same names for every batch, with"
                " denominator 0 for nothing."
            )
        self.names = names
        if names:
            values = [self._scalar(value) for name in names for value in metrics[name]]
            self._parts.append(torch.stack(values))

    def _scalar(self, value: Any) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.detach().to(self.device, self.dtype).reshape(())
        return torch.full((), value, dtype=self.dtype, device=self.device)

    def sums(self) -> torch.Tensor:
        """Numerator and denominator of each, one after the other: [2 x metrics]."""
        if not self._parts:
            return torch.zeros(2 * len(self.names or ()), dtype=self.dtype, device=self.device)
        return torch.stack(self._parts).sum(0)

    def agree(self, processes: Processes) -> None:
        """Raise UserError where ranks have metrics of other names: they could not be added. Waits for all ranks."""
        everywhere = processes.from_all(self.names)
        if len(set(everywhere)) > 1:
            said = "; ".join(f"rank {rank}: {', '.join(names or ())}" for rank, names in enumerate(everywhere))
            raise UserError(f"task: its metrics have other names on other ranks: {said}. Return the same names.")

    def divided(self, sums: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each metric, on the device, from ``sums`` over all ranks."""
        pairs = sums.view(-1, 2)
        return dict(zip(self.names or (), (pairs[:, 0] / pairs[:, 1]).unbind(), strict=True))

    def pairs(self, sums: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of each metric the numerator and the denominator, [2], of ``sums`` over all ranks."""
        return dict(zip(self.names or (), sums.view(-1, 2).unbind(), strict=True))


def refuse_other_statistics(shapes: Mapping[str, torch.Size], processes: Processes) -> None:
    """Raise UserError where ranks have statistics of other names or ``shapes`` than here. Waits for all ranks."""
    everywhere = processes.from_all([(name, tuple(shape)) for name, shape in shapes.items()])
    if any(found != everywhere[0] for found in everywhere):
        said = "; ".join(f"rank {rank}: {found}" for rank, found in enumerate(everywhere))
        raise UserError(f"task: its statistics are others on other ranks: {said}. Return the same everywhere.")
