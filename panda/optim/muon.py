"""The ``muon`` optimizer: orthogonal steps for matrices, AdamW for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any
from typing import Literal

from panda.optim.adam_options import AdamOptions
from panda.registry import Meta
from panda.registry import register_optimizer
from panda.registry.contexts import OptimizerContext

if TYPE_CHECKING:
    import torch

ORTHOGONAL = ("matrix", "expert", "adapter")
"""The kinds of parameter that get orthogonal steps; embeddings and the head are no maps between hidden states."""


@dataclass(frozen=True)
class MuonOptions(AdamOptions):
    """Options of Muon. adam_betas and adam_epsilon are those of its AdamW."""

    muon_momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.95
    """Decay rate of the moving average of a matrix's gradients."""
    muon_nesterov: bool = True
    """Look one step of the moving average ahead."""
    muon_scale: Literal["adamw", "spectral"] = "adamw"
    """Length of a step: 0.2 sqrt(max(rows, columns)), with which AdamW's learning rate and decay fit
    (arXiv 2502.16982), or K. Jordan's sqrt(max(1, rows / columns)), for rates such as 0.02."""
    newton_schulz_steps: Annotated[int, Meta(ge=1, le=20)] = 5
    """Iterations that make a matrix orthogonal."""
    newton_schulz_precision: Literal["auto", "bf16", "fp32"] = "auto"
    """The type in which they are computed and sent: auto is bf16 on a GPU and fp32 elsewhere."""
    adamw_learning_rate: Annotated[float, Meta(gt=0)] | None = None
    """The peak learning rate of embeddings, head, norms, biases and vectors, which AdamW steps; by default
    learning_rate."""


@register_optimizer("muon", options=MuonOptions, needs="parameters")
def build_muon(options: MuonOptions, context: OptimizerContext) -> torch.optim.Optimizer:
    """Muon: matrices move by their orthogonalised momentum, exact under every ZeRO stage; AdamW moves the rest.

    Of the model's hidden layers, each matrix (K. Jordan, https://kellerjordan.github.io/posts/muon), each expert's,
    and those of adapters; a matrix that the model stores fused, such as one of queries, keys and values, is one.
    AdamW moves embeddings, the output head, norms, biases and vectors.
    """
    import torch

    from panda.optim.orthogonal import Muon

    precision = options.newton_schulz_precision
    if precision == "auto":
        precision = "bf16" if context.device.type == "cuda" else "fp32"
    return Muon(
        _groups(options, context),
        momentum=options.muon_momentum,
        nesterov=options.muon_nesterov,
        scale=options.muon_scale,
        steps=options.newton_schulz_steps,
        dtype=torch.bfloat16 if precision == "bf16" else None,
        betas=options.adam_betas,
        eps=options.adam_epsilon,
    )


def _groups(options: MuonOptions, context: OptimizerContext) -> list[dict[str, Any]]:
    """Each group as two, so that each tensor of DeepSpeed's, which holds a group, is stepped in one way."""
    factor = (options.adamw_learning_rate or context.learning_rate) / context.learning_rate
    groups = []
    for group in context.param_groups:
        for orthogonal in (True, False):
            chosen = [each for each in group["params"] if _is_orthogonal(each, context) is orthogonal]
            if chosen:
                rate = group["lr"] * (1.0 if orthogonal else factor)
                groups.append({**group, "params": chosen, "lr": rate, "orthogonal": orthogonal})
    return groups


def _is_orthogonal(parameter: torch.Tensor, context: OptimizerContext) -> bool:
    described = context.described.get(parameter)
    return parameter.dim() == 2 if described is None else described.kind in ORTHOGONAL
