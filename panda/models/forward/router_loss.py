"""The loss that balances the load of a mixture of experts, over a whole optimizer step.

It is transformers' own (``load_balancing_loss_func``, after Switch Transformers, arXiv 2101.03961): the number of
experts times the sum over them of (share of the tokens that chose it) x (mean of its probability), over the tokens of
all layers. transformers takes shares and means of one forward pass; a product of means depends on how a step is split
into such passes. Here they are of the step, on all ranks, padding left out: what transformers would compute if the
step were one batch, however it is split and packed. Shares have no gradient. So they are counted first, in a forward
pass of each micro batch without gradients; with a single micro batch to a rank, in the pass that is trained.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the customary name

from panda.registry import UserError


class RouterLoss:
    """The router loss of a model: see ``StepLoss`` in panda.registry.contexts, which it is one of."""

    def __init__(self, weight: float, experts: int, chosen: int) -> None:
        """``experts`` of each layer, of which each token uses ``chosen``."""
        self.weight = weight
        self._experts, self._chosen = experts, chosen
        self._real: torch.Tensor | None = None
        self._statistics: torch.Tensor | None = None
        self._sum: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._term: torch.Tensor | None = None

    def count(self, real: torch.Tensor, forward: Callable[[], Any]) -> torch.Tensor:
        """What ``forward``, a pass of the model over a micro batch, adds to the statistics of the step.

        ``real`` [rows, length]: which tokens are not padding.
        """
        with torch.no_grad():
            _, statistics = self._during(real, None, None, forward)
        assert statistics is not None, "the forward pass did not reach the model"
        return statistics

    def term(
        self,
        real: torch.Tensor,
        statistics: torch.Tensor | None,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
        forward: Callable[[], Any],
    ) -> tuple[Any, torch.Tensor]:
        """The result of ``forward``, and the part of the loss of the step that its micro batch contributes: a scalar.

        ``statistics`` are those of the step; None for those of this pass, summed over ranks.
        """
        result, term = self._during(real, statistics, sum_over_ranks, forward)
        assert term is not None, "the forward pass did not reach the model"
        return result, term

    def _during(
        self, real: Any, statistics: Any, sum_: Any, forward: Callable[[], Any]
    ) -> tuple[Any, torch.Tensor | None]:
        self._real, self._statistics, self._sum, self._term = real, statistics, sum_, None
        try:
            return forward(), self._term
        finally:
            self._real = self._statistics = self._sum = self._term = None

    @property
    def is_due(self) -> bool:
        """Whether the next forward pass is to call ``see``."""
        return self._real is not None

    def see(self, router_logits: tuple[torch.Tensor, ...]) -> None:
        """Take in the logits of the routers in a forward pass: [tokens, experts], of each layer."""
        assert self._real is not None
        real = self._real.flatten()
        if self._term is not None or any(len(logits) != len(real) for logits in router_logits):
            raise UserError(
                "router_aux_loss_coef: the loss of this task runs the model more than once for a batch, or on other"
                " rows than the batch's, and the router loss is that of one run. Write `router_aux_loss_coef: 0`."
            )
        counts = real.new_zeros(self._experts + 1, dtype=torch.float64)  # sums of integers: exact in any order
        probabilities = torch.zeros(self._experts, device=real.device)
        for logits in router_logits:
            weights = F.softmax(logits, dim=-1)  # in the type of the logits, as transformers does it
            picked = weights.topk(self._chosen, dim=-1).indices
            counts[: self._experts].scatter_add_(0, picked.flatten(), real.repeat_interleave(self._chosen).double())
            counts[-1] += real.sum()
            probabilities = probabilities + (weights.float() * real.unsqueeze(-1)).sum(0)
        if self._sum is None:
            self._term = counts
            return
        statistics = self._sum(counts) if self._statistics is None else self._statistics
        tokens = statistics[-1].clamp(min=1)
        shares = statistics[:-1] / tokens
        self._term = self._experts * (shares.float() * probabilities).sum() / tokens.float()


def has_router_loss(model: Any) -> bool:
    """Whether transformers has this loss for ``model``."""
    from transformers.models.mixtral import modeling_mixtral

    own = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    # Each family has a copy; two that are not copies (transformers 5.23, 2026-11) compute something else.
    known = own is not None and inspect.getsource(own) == inspect.getsource(modeling_mixtral.load_balancing_loss_func)
    return known and hasattr(model, "num_experts") and hasattr(model, "num_experts_per_tok")


def own_weight(model: Any) -> float:
    """The weight that the config of ``model`` has for this loss, whether or not it is on there; 0 for none."""
    return float(getattr(model, "router_aux_loss_coef", getattr(model, "aux_loss_coef", 0.0)))


def offer_router_loss(model: Any, weight: float) -> None:
    """Make ``model``, for which transformers has a router loss, compute it with ``weight``: as its ``step_loss``."""
    loss = RouterLoss(weight, model.num_experts, model.num_experts_per_tok)
    base = model.base_model
    plain_forward = base.forward

    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if not loss.is_due:
            return plain_forward(*arguments, **keywords)
        output = plain_forward(*arguments, **keywords | {"output_router_logits": True})
        loss.see(output.router_logits)
        return output

    base.forward = MethodType(forward, base)
    model.step_loss = loss
