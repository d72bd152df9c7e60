"""The ``lion`` optimizer (arXiv 2302.06675)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated

from panda import Meta
from panda import register_optimizer
from panda.registry.contexts import OptimizerContext

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LionOptions:
    """Options of Lion."""

    lion_betas: tuple[Annotated[float, Meta(ge=0, lt=1)], Annotated[float, Meta(ge=0, lt=1)]] = (0.9, 0.99)
    """Weight of the past in the update's direction, and in the momentum that is kept."""


@register_optimizer("lion", options=LionOptions)
def build_lion(options: LionOptions, context: OptimizerContext) -> torch.optim.Optimizer:
    """Lion: the sign of momentum (arXiv 2302.06675). Needs a third to a tenth of AdamW's learning rate."""
    from panda_example.stepping import Lion

    return Lion(context.param_groups, betas=options.lion_betas)
