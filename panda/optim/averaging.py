"""The arithmetic of ``schedule_free_adamw``: weights to train with, and their average to evaluate with."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import torch


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """Schedule-free AdamW (arXiv 2405.15682, algorithm 1), element by element.

    There are three sequences of weights: z, which moves, its average x, and y between them, at which gradients g are
    taken. In step t, with the rate lr and d = g / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay y::

        v = beta2 v + (1 - beta2) g^2
        z = z - lr d
        x = (1 - c) x + c z          c = w / (the sum of w so far), w = (the highest lr so far)^2
        y = (1 - beta1) z + beta1 x

    The tensors are y, and ``eval_weights`` turns them into x. The state of a tensor is ``step``, ``z``, ``exp_avg_sq``,
    ``highest_rate`` and ``weight_sum``; and ``y`` while the tensors are x.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._beta1 = betas[0]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of each tensor that has a gradient. Gradients are overwritten."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._move(tensor, tensor.grad, group)
        return loss

    def _move(self, y: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[y]
        if not state:
            state |= {"step": 0, "z": y.clone(), "exp_avg_sq": torch.zeros_like(y)}
            state |= {"highest_rate": 0.0, "weight_sum": 0.0}
        rate, beta2 = group["lr"], group["betas"][1]
        state["step"] += 1
        state["highest_rate"] = max(rate, state["highest_rate"])
        weight = state["highest_rate"] ** 2
        state["weight_sum"] += weight
        share = weight / state["weight_sum"] if state["weight_sum"] else 0.0
        square, z = state["exp_avg_sq"], state["z"]
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        direction = gradient.div_(square.div(1 - beta2 ** state["step"]).sqrt_().add_(group["eps"]))
        direction.add_(y, alpha=group["weight_decay"])
        # y in terms of y, z before this step and the direction: x is nowhere.
        y.lerp_(z, share)
        y.add_(direction, alpha=rate * (self._beta1 * (1 - share) - 1))
        z.sub_(direction, alpha=rate)

    @torch.no_grad()
    def eval_weights(self) -> None:
        """Turn the tensors into the weights to evaluate, export and save: x."""
        for y, state in self.state.items():
            if "y" not in state:
                state["y"] = y.detach().clone()  # x and z give it to rounding only
                y.lerp_(state["z"], 1 - 1 / self._beta1)

    @torch.no_grad()
    def train_weights(self) -> None:
        """Turn them back into those to train with, to the bit, also after a checkpoint was loaded."""
        for tensor, state in self.state.items():
            if "y" in state:
                tensor.copy_(state.pop("y"))
