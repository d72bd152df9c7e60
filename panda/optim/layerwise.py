"""The arithmetic behind ``nvlamb``: steps whose length is decided layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw

from panda.registry.contexts import ParameterLayout
from panda.registry.contexts import Segment
from panda.registry.contexts import TensorLayout

NORM_ROW = 4096
"""Elements that are summed in fp32 before the sums are summed in float64, on the CPU."""


class NVLamb(torch.optim.Optimizer):
    """LAMB as NVIDIA's apex has it (``FusedLAMB`` with ``use_nvlamb``), without its clipping.

    For each parameter tensor w, at its step t::

        m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w
        r = ||w|| / ||u||  where both norms are above 0, else 1
        w = w - lr r u

    DeepSpeed puts flat tensors in the place of parameters, each a rank's part of several, and steps
    them one or more at a time. ``bind`` says what lies where; then r is the ratio of the parameter
    whose part it is: the squared norms of all segments of a call are summed over ranks in one
    all-reduce, in float64. Unbound, each tensor is a parameter.

    Gradients have to be averaged and clipped before; they are **overwritten**, by u: with it the peak
    of memory is that of AdamW. Nothing waits for the device. State of a tensor: ``step`` (an int, of
    that tensor alone, since DeepSpeed's calls are of one group or sub-group), ``exp_avg``, ``exp_avg_sq``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        adapt: str = "all",
    ) -> None:
        """``adapt``: "all" tensors get a trust ratio, or the "decayed" ones, of groups with weight decay."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adapt = adapt
        self._layouts: dict[torch.Tensor, TensorLayout] = {}
        self._sum_over_shards: Callable[[torch.Tensor], torch.Tensor]
        self._row_indices: dict[tuple[torch.Tensor, ...], torch.Tensor] = {}
        self._ratios: dict[torch.Tensor, torch.Tensor] = {}

    def bind(self, layout: ParameterLayout) -> None:
        """Learn what lies where in the tensors that it will step."""
        self._layouts = {described.tensor: described for described in layout.tensors}
        self._sum_over_shards = layout.sum_over_shards

    def observe(self) -> dict[str, tuple[list[str], torch.Tensor]]:
        """``trust_ratio``: names of the parameters, and the ratio that each had in its last step, on the device.

        The same on every rank. Without those that have not been stepped or get no ratio.
        """
        names = [name for tensor in self._ratios for name in self._layouts[tensor].parameters]
        ratios = list(self._ratios.values())
        return {"trust_ratio": (names, torch.cat(ratios))} if ratios else {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of each tensor that has a gradient. Every rank has to call it with the same groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._layouts:
            self.bind(_whole_parameters(self.param_groups))
        adapting = []
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if tensors:
                self._replace_gradients_by_updates(tensors, group)
            if self.adapt == "all" or group["weight_decay"] != 0:
                adapting += [(tensor, group["lr"]) for tensor in group["params"]]
            elif tensors:
                torch._foreach_add_(tensors, _gradients(tensors), alpha=-group["lr"])
        if adapting:
            self._move_by_trust_ratios(adapting)
        return loss

    def _replace_gradients_by_updates(self, tensors: list[torch.Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for tensor in tensors:
            state = self.state[tensor]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(tensor)
                state["exp_avg_sq"] = torch.zeros_like(tensor)
        states = [self.state[tensor] for tensor in tensors]
        gradients = _gradients(tensors)
        # torch's fused kernel, with the gradient in the place of the weight too. A rate and a decay of
        # -1 make of it g - (-1)(-1) g + m / (sqrt(v) + eps), and the first two are 0, exactly: one pass
        # over memory, and none of it new.
        adamw(
            gradients,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [torch.full((), float(state["step"]), device=state["exp_avg"].device) for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=-1.0,
            weight_decay=-1.0,
            eps=group["eps"],
            maximize=False,
        )
        for state in states:
            state["step"] += 1
        if group["weight_decay"] != 0:
            torch._foreach_add_(gradients, tensors, alpha=group["weight_decay"])

    def _move_by_trust_ratios(self, adapting: list[tuple[torch.Tensor, float]]) -> None:
        """Move each tensor, given with its rate, by its update times the ratio of each parameter in it."""
        described = [self._layouts[tensor] for tensor, _ in adapting]
        counts = [len(layout.parameters) for layout in described]
        stretches = [_stretches(layout) for layout in described]
        weights = [weight for pairs in stretches for weight, _ in pairs]
        updates = [update for pairs in stretches for _, update in pairs]
        squares = torch.zeros(sum(counts), 2, dtype=torch.float64, device=adapting[0][0].device)
        if weights:
            rows = self._rows(described)
            squares.index_add_(0, rows, torch.stack([_squared_norms(weights), _squared_norms(updates)], dim=1))
        weight_norm, update_norm = self._sum_over_shards(squares).sqrt().unbind(1)
        ratios = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
        if weights:
            factors = list(ratios[rows].to(weights[0].dtype).unbind())
            for (_, rate), pairs in zip(adapting, stretches, strict=True):
                for weight, update in pairs:
                    weight.addcmul_(update, factors.pop(0), value=-rate)
        parts = torch.split_with_sizes(ratios, counts)
        self._ratios |= {tensor: part for (tensor, _), part in zip(adapting, parts, strict=True)}

    def _rows(self, layouts: list[TensorLayout]) -> torch.Tensor:
        """For each segment that has a gradient, the row of its parameter among all that ``layouts`` name."""
        key = tuple(layout.tensor for layout in layouts if layout.tensor.grad is not None)
        if key not in self._row_indices:
            rows, before = [], 0
            for layout in layouts:
                if layout.tensor.grad is not None:
                    rows += [before + segment.parameter for segment in layout.segments]
                before += len(layout.parameters)
            self._row_indices[key] = torch.tensor(rows, device=key[0].device)  # once: it waits for the device
        return self._row_indices[key]


def _gradients(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.grad for tensor in tensors if tensor.grad is not None]


def _whole_parameters(groups: list[dict[str, Any]]) -> ParameterLayout:
    tensors = [tensor for group in groups for tensor in group["params"]]
    return ParameterLayout(
        tuple(
            TensorLayout(tensor, (str(number),), (Segment(0, 0, tensor.numel(), 0),))
            for number, tensor in enumerate(tensors)
        ),
        lambda squares: squares,
    )


def _stretches(layout: TensorLayout) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The weights and the updates of each segment, if there are any."""
    tensor, gradient = layout.tensor, layout.tensor.grad
    if gradient is None:
        return []
    return [
        (tensor, gradient)  # of any shape and strides
        if segment.length == tensor.numel()
        else (tensor.narrow(0, segment.start, segment.length), gradient.narrow(0, segment.start, segment.length))
        for segment in layout.segments
    ]


def _squared_norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    """float64 [len(tensors)]."""
    if not tensors[0].is_cpu:
        return torch.stack(torch._foreach_norm(tensors, dtype=torch.float64)).square()
    # On the CPU torch sums one fp32 after another: off by 3e-3 at the size of a LLaMA-7B matrix. Asked
    # for float64 it is right, and twenty times slower than rows of fp32 sums, summed in float64.
    return torch.stack([_squared_norm(tensor.reshape(-1)) for tensor in tensors])


def _squared_norm(flat: torch.Tensor) -> torch.Tensor:
    whole = flat.numel() // NORM_ROW * NORM_ROW
    rows: torch.Tensor = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_ROW), dim=1)
    return rows.double().square().sum() + flat[whole:].double().square().sum()
