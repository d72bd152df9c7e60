"""The ``adamw`` optimizer (arXiv 1711.05101)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated

from panda.registry import Meta
from panda.registry import register_optimizer
from panda.registry.contexts import OptimizerContext

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AdamWOptions:
    """Options of AdamW."""

    adam_betas: tuple[Annotated[float, Meta(ge=0, lt=1)], Annotated[float, Meta(ge=0, lt=1)]] = (0.9, 0.99)
    """Decay rates of the running means of gradients and of squared gradients."""
    adam_epsilon: Annotated[float, Meta(gt=0)] = 1e-6
    """Added to the root of the second moment."""


@register_optimizer("adamw", options=AdamWOptions)
def build_adamw(options: AdamWOptions, context: OptimizerContext) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (arXiv 1711.05101); torch's, fused on a GPU."""
    if context.bit_training:
        from panda.optim.eight_bit import adamw8bit

        return adamw8bit(context.param_groups, betas=options.adam_betas, eps=options.adam_epsilon)
    from torch.optim import AdamW

    return AdamW(
        context.param_groups,
        betas=options.adam_betas,
        eps=options.adam_epsilon,
        fused=context.device.type == "cuda",
    )
