"""The ``nvlamb`` optimizer: LAMB (arXiv 1904.00962) as NVIDIA trains with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Literal

from panda.optim.adam_options import AdamOptions
from panda.registry import register_optimizer
from panda.registry.contexts import OptimizerContext

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class NVLambOptions(AdamOptions):
    """Options of NVLAMB."""

    trust_ratio: Literal["all", "decayed"] = "all"
    """Tensors whose step is scaled to their norm: all, or only those with weight decay, apex's default."""


@register_optimizer("nvlamb", options=NVLambOptions, aliases=("lamb",), needs="norms")
def build_nvlamb(options: NVLambOptions, context: OptimizerContext) -> torch.optim.Optimizer:
    """NVLAMB: AdamW with each layer's step scaled to the norm of its weights, exact under every ZeRO stage.

    Each parameter tensor moves by learning_rate times its own norm, in AdamW's direction, for large
    batches (arXiv 1904.00962, and NVIDIA's apex with use_nvlamb). With bias correction, and without
    bounds on the trust ratio; gradients are clipped once, over the whole model, by max_grad_norm.
    """
    from panda.optim.layerwise import NVLamb

    return NVLamb(
        context.param_groups,
        betas=options.adam_betas,
        eps=options.adam_epsilon,
        adapt=options.trust_ratio,
    )
