"""The ``adamw`` optimizer (arXiv 1711.05101)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from panda.optim.adam_options import AdamOptions
from panda.registry import register_optimizer
from panda.registry.contexts import OptimizerContext

if TYPE_CHECKING:
    import torch


@register_optimizer("adamw", options=AdamOptions)
def build_adamw(options: AdamOptions, context: OptimizerContext) -> torch.optim.Optimizer:
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
