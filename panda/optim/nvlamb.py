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
    """Tensors whose step is scaled to their norm: all, or those with weight decay, as apex's FusedLAMB has it."""


@register_optimizer("nvlamb", options=NVLambOptions, aliases=("lamb",))
def build_nvlamb(options: NVLambOptions, context: OptimizerContext) -> torch.optim.Optimizer:
    """NVLAMB: AdamW with a step as long as the layer's norm asks for, exact under every ZeRO stage.

    Each parameter tensor moves by learning_rate times its own norm, in Adam's direction, for large
    batches (arXiv 1904.00962, and NVIDIA's apex with use_nvlamb). With bias correction; gradients are
    clipped by max_grad_norm, once and over all of them; no bounds on the trust ratio.
    """
    from panda.optim.layerwise import NVLamb

    return NVLamb(
        context.param_groups,
        betas=options.adam_betas,
        eps=options.adam_epsilon,
        adapt=options.trust_ratio,
    )
