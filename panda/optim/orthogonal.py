"""The arithmetic of ``muon``: matrices move by the orthogonal matrix that is nearest to their momentum."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw

from panda.optim.unsharded import unsharded
from panda.registry.contexts import ParameterLayout
from panda.registry.contexts import Segment
from panda.registry.contexts import TensorLayout

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, by K. Jordan (https://kellerjordan.github.io/posts/muon): steep at 0, so that five steps
bring all singular values that count into 0.7 to 1.2, and not to 1."""
SMALLEST_NORM = 1e-7


def newton_schulz(matrices: torch.Tensor, steps: int) -> torch.Tensor:
    """About U V^T of each of the ``matrices`` U S V^T, [..., rows, columns], in their type; zeros stay zeros."""
    a, b, c = COEFFICIENTS
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=SMALLEST_NORM)
    fused = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = fused(x, fused(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def adamw_scale(rows: int, columns: int) -> float:
    """A step as long as AdamW's, whose elements are about 0.2 in root mean square (arXiv 2502.16982, section 2.2)."""
    return 0.2 * math.sqrt(max(rows, columns))


def spectral_scale(rows: int, columns: int) -> float:
    """K. Jordan's: all steps have the same length as maps from inputs to outputs, except to fewer outputs."""
    return math.sqrt(max(1.0, rows / columns))


SCALES: dict[str, Callable[[int, int], float]] = {"adamw": adamw_scale, "spectral": spectral_scale}


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan, 2024) for the groups that are ``orthogonal``, and AdamW for the others.

    For each matrix w, with its gradient g::

        m = momentum m + (1 - momentum) g
        u = (1 - momentum) g + momentum m      with nesterov, else m
        w = w - lr weight_decay w - lr scale(rows, columns) NewtonSchulz(u)

    The steps of Newton-Schulz need the whole matrix. So each is gathered on one rank, which takes them and gives each
    rank its part of the result (``ParameterLayout.gather``); moments stay where the elements are. A parameter with more
    than two dimensions is a stack of matrices in its last two.

    Gradients have to be averaged and clipped before; they are left as they are. The state of a tensor is ``exp_avg``
    in orthogonal groups, in others that of AdamW with ``step`` as an int.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: str = "adamw",
        steps: int = 5,
        dtype: torch.dtype | None = None,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
    ) -> None:
        """``dtype``: of the iteration, and of what is sent for it; by default that of the weights.

        ``betas`` and ``eps`` are AdamW's.
        """
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        super().__init__(params, {**defaults, "orthogonal": True, "betas": betas, "eps": eps})
        self.scale, self.steps, self.dtype = SCALES[scale], steps, dtype
        self._layout: ParameterLayout | None = None
        self._layouts: dict[torch.Tensor, TensorLayout] = {}

    def bind(self, layout: ParameterLayout) -> None:
        """Learn where each parameter lies in the tensors that will be stepped."""
        self._layout = layout
        self._layouts = {described.tensor: described for described in layout.tensors}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of each tensor that has a gradient. Every rank has to call it with the same groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._layout is None:
            self.bind(unsharded(self.param_groups))
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if tensors and group["orthogonal"]:
                self._step_matrices(tensors, group)
            elif tensors:
                self._step_adamw(tensors, group)
        return loss

    def _step_matrices(self, tensors: list[torch.Tensor], group: dict[str, Any]) -> None:
        assert self._layout is not None
        layouts = [self._layouts[tensor] for tensor in tensors]
        dtype = self.dtype or tensors[0].dtype
        momenta = [self._momentum(tensor, group).to(dtype) for tensor in tensors]
        wholes = self._layout.gather(layouts, momenta)
        del momenta
        for name, whole in wholes.items():
            wholes[name] = newton_schulz(whole, self.steps)
        updates = self._layout.scatter(layouts, wholes, dtype=dtype)
        for layout, update in zip(layouts, updates, strict=True):
            for segment in layout.segments:
                rows, columns = self._layout.described[layout.parameters[segment.parameter]].shape[-2:]
                weight = _stretch(layout.tensor, segment)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(_stretch(update, segment), alpha=-group["lr"] * self.scale(rows, columns))

    def _momentum(self, tensor: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """The momentum of ``tensor``, with its gradient; with nesterov, as it will be after the next one."""
        assert tensor.grad is not None
        state = self.state[tensor]
        if not state:
            state["exp_avg"] = torch.zeros_like(tensor)
        mean: torch.Tensor = state["exp_avg"].lerp_(tensor.grad, 1 - group["momentum"])
        return tensor.grad.lerp(mean, group["momentum"]) if group["nesterov"] else mean

    def _step_adamw(self, tensors: list[torch.Tensor], group: dict[str, Any]) -> None:
        for tensor in tensors:
            state = self.state[tensor]
            if not state:
                state |= {"step": 0, "exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}
        states = [self.state[tensor] for tensor in tensors]
        beta1, beta2 = group["betas"]
        adamw(
            tensors,
            [tensor.grad for tensor in tensors if tensor.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [torch.full((), float(state["step"]), device=tensors[0].device) for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for state in states:
            state["step"] += 1


def _stretch(tensor: torch.Tensor, segment: Segment) -> torch.Tensor:
    """The elements of ``segment``: all of a ``tensor`` of any shape and strides, or some of a flat one."""
    return tensor if segment.length == tensor.numel() else tensor.narrow(0, segment.start, segment.length)
