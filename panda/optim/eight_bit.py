"""Optimizers with 8-bit state (arXiv 2110.02861) from bitsandbytes, an optional dependency."""

from __future__ import annotations

from typing import TYPE_CHECKING
from typing import Any

from panda.optim.adam_options import AdamOptions
from panda.registry import UserError
from panda.registry import register_optimizer
from panda.registry.contexts import OptimizerContext

if TYPE_CHECKING:
    import torch


@register_optimizer("adamw8bit", options=AdamOptions)
def build_adamw8bit(options: AdamOptions, context: OptimizerContext) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW, whose two moments take one byte each, not four. The same as adamw with bit_training."""
    return adamw8bit(context.param_groups, betas=options.adam_betas, eps=options.adam_epsilon)


@register_optimizer("paged_adamw8bit", options=AdamOptions)
def build_paged_adamw8bit(options: AdamOptions, context: OptimizerContext) -> torch.optim.Optimizer:
    """adamw8bit whose state moves to host memory when the GPU's is full; on a CPU the same as adamw8bit."""
    return adamw8bit(context.param_groups, betas=options.adam_betas, eps=options.adam_epsilon, is_paged=True)


def adamw8bit(
    param_groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float, is_paged: bool = False
) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit. Raises UserError if bitsandbytes is not installed."""
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
        from bitsandbytes.optim.adamw import PagedAdamW8bit
    except ImportError:
        raise UserError(
            "optimizer: 8-bit state needs bitsandbytes, which is not installed: pip install 'panda-train[gpu]'."
        ) from None
    kind: type[torch.optim.Optimizer] = PagedAdamW8bit if is_paged else AdamW8bit
    return kind(param_groups, betas=betas, eps=eps)  # type: ignore[call-arg]
