"""What goes into an optimizer step or an evaluation, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Protocol
from typing import TypeVar

import torch

from panda.registry.contexts import Loss

BatchType = TypeVar("BatchType", bound="CountedBatch")
LossSum = Callable[..., Loss | torch.Tensor]
"""From the module and a batch, and the statistics of the step where there are some, to the loss of the batch."""
Statistics = Mapping[str, torch.Tensor]
Judge = Callable[[torch.Tensor, Any], bool]
"""From the loss per unit and the norm of the gradients of a step to whether it is taken; the same on all ranks."""


class CountedBatch(Protocol):
    """A micro batch that knows how many tokens and units it has, and whether it counts."""

    @property
    def tokens(self) -> int: ...

    @property
    def units(self) -> float: ...

    @property
    def idle(self) -> bool: ...

    @property
    def real(self) -> torch.Tensor | None: ...

    def to(self: BatchType, device: torch.device) -> BatchType: ...


@dataclass(frozen=True)
class StepResult:
    """The results of an optimizer step, still on the device: reading a value waits for it."""

    loss: torch.Tensor
    """Scalar: loss per unit, over the whole step and all ranks. It lacks ``step_loss``."""
    grad_norm: torch.Tensor | float
    """Norm of all gradients, before clipping."""
    counts: torch.Tensor
    """float64 [2]: tokens, and units, of the whole step on all ranks."""
    applied: bool
    """False if the loss or gradients were not finite, or the step was judged not to be taken: weights, optimizer and
    random numbers are then as they were before the step."""
    step_loss: torch.Tensor | None = None
    """Scalar: the model's own loss over the step, without its weight; None for a model without one."""
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Scalars: of each metric of the task the sum of its numerators divided by that of its denominators."""


@dataclass(frozen=True)
class Evaluated:
    """The results of an evaluation, still on the device."""

    sum: torch.Tensor
    """Scalar: the loss, summed over units."""
    counts: torch.Tensor
    """float64 [2]: tokens, and units."""
    pairs: Mapping[str, torch.Tensor]
    """Of each metric of the task the sums of its numerators and of its denominators: [2]."""

    @property
    def loss(self) -> torch.Tensor:
        """Scalar: per unit."""
        return self.sum / self.counts[1].masked_fill(self.counts[1] == 0, 1)

    @property
    def metrics(self) -> dict[str, torch.Tensor]:
        """Each metric: a scalar."""
        return {name: pair[0] / pair[1] for name, pair in self.pairs.items()}


def together(found: Sequence[Evaluated]) -> Evaluated:
    """The results of evaluations, at least one, as of one over all of their samples."""
    if len(found) == 1:
        return found[0]
    pairs = {name: torch.stack([each.pairs[name] for each in found]).sum(0) for name in found[0].pairs}
    return Evaluated(
        torch.stack([each.sum for each in found]).sum(0), torch.stack([each.counts for each in found]).sum(0), pairs
    )
