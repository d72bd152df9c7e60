"""The arithmetic of ``nvlamb``: the length of each layer's step follows the norm of its weights."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import torch

from panda.files.compilers import can_compile
from panda.optim import layerwise_torch
from panda.optim.unsharded import unsharded
from panda.registry.contexts import ParameterLayout
from panda.registry.contexts import TensorLayout


class NVLamb(torch.optim.Optimizer):
    """LAMB as in NVIDIA's apex (``FusedLAMB`` with ``use_nvlamb``), without its clipping.

    For each parameter tensor w, at its step t::

        m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w
        r = ||w|| / ||u||  where both norms are above 0, else 1
        w = w - lr r u

    DeepSpeed replaces parameters by flat tensors, each one rank's part of several parameters, and
    steps one or more of them at a time. ``bind`` says where each parameter lies in them. r is then the
    ratio of whole parameters: the squared norms of all segments in a call are summed over ranks in one
    all-reduce, in float64. Without ``bind``, each tensor is one parameter.

    Gradients have to be averaged and clipped before. They are **overwritten**, by u and then by zeros,
    so that the memory peak is that of AdamW. Nothing waits for the device. The state of a tensor is
    ``step`` (an int for each tensor, since DeepSpeed steps one group or sub-group in a call),
    ``exp_avg`` and ``exp_avg_sq``.
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
        """``adapt``: which tensors get a trust ratio: "all", or "decayed", those in groups with weight decay."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adapt = adapt
        self._layouts: dict[torch.Tensor, TensorLayout] = {}
        self._sum_over_shards: Callable[[torch.Tensor], torch.Tensor]
        self._row_indices: dict[tuple[tuple[torch.Tensor, bool], ...], torch.Tensor] = {}
        self._ratios: dict[torch.Tensor, torch.Tensor] = {}

    def bind(self, layout: ParameterLayout) -> None:
        """Learn where each parameter lies in the tensors that will be stepped."""
        self._layouts = {described.tensor: described for described in layout.tensors}
        self._sum_over_shards = layout.sum_over_shards

    def observe(self) -> dict[str, tuple[list[str], torch.Tensor]]:
        """``trust_ratio``: names of the parameters, and the ratio that each had in its last step, on the device.

        The same on every rank. Parameters that were never stepped, or get no ratio, are left out.
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
            self.bind(unsharded(self.param_groups))
        adapting, squares = [], []
        for group in self.param_groups:
            stepped = [self._layouts[tensor] for tensor in group["params"] if tensor.grad is not None]
            adapts = self.adapt == "all" or group["weight_decay"] != 0
            if adapts:
                adapting += [(self._layouts[tensor], group["lr"]) for tensor in group["params"]]
            if not stepped:
                continue
            states = [self._state_of(layout.tensor) for layout in stepped]
            arithmetic = _arithmetic(stepped)
            norms = arithmetic.replace_gradients(stepped, states, group)
            for state in states:
                state["step"] += 1
            if adapts:
                squares.append(norms)
            else:
                arithmetic.move(stepped, group["lr"], torch.ones_like(norms[:, 0]))
        if adapting:
            self._move_by_trust_ratios(adapting, squares)
        return loss

    def _state_of(self, tensor: torch.Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[tensor]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(tensor)
            state["exp_avg_sq"] = torch.zeros_like(tensor)
        return state

    def _move_by_trust_ratios(
        self, adapting: list[tuple[TensorLayout, float]], squares_of_segments: list[torch.Tensor]
    ) -> None:
        """Move each tensor (given with its rate) by its update, scaled by the ratio of each parameter in it."""
        counts = [len(layout.parameters) for layout, _ in adapting]
        rows = self._rows([layout for layout, _ in adapting])
        squares = torch.zeros(sum(counts), 2, dtype=torch.float64, device=rows.device)
        if squares_of_segments:
            squares.index_add_(0, rows, torch.cat(squares_of_segments))
        weight_norm, update_norm = self._sum_over_shards(squares).sqrt().unbind(1)
        ratios = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
        stepped = [(layout, rate) for layout, rate in adapting if layout.tensor.grad is not None]
        factors = torch.split_with_sizes(ratios[rows], [len(layout.segments) for layout, _ in stepped])
        for (layout, rate), own in zip(stepped, factors, strict=True):
            _arithmetic([layout]).move([layout], rate, own)
        parts = torch.split_with_sizes(ratios, counts)
        self._ratios |= {layout.tensor: part for (layout, _), part in zip(adapting, parts, strict=True)}

    def _rows(self, layouts: list[TensorLayout]) -> torch.Tensor:
        """For each segment that has a gradient, the index of its parameter among all parameters of ``layouts``."""
        key = tuple((layout.tensor, layout.tensor.grad is None) for layout in layouts)
        if key not in self._row_indices:
            rows, before = [], 0
            for layout in layouts:
                if layout.tensor.grad is not None:
                    rows += [before + segment.parameter for segment in layout.segments]
                before += len(layout.parameters)
            device = layouts[0].tensor.device
            self._row_indices[key] = torch.tensor(rows, dtype=torch.long, device=device)  # this copy waits
        return self._row_indices[key]


def _arithmetic(layouts: list[TensorLayout]) -> Any:
    """The module that computes steps of the tensors in ``layouts``: with Triton kernels if it can, else with torch."""
    fits = all(
        layout.tensor.is_cuda and layout.tensor.dtype == torch.float32 and layout.tensor.is_contiguous()
        for layout in layouts
    )
    if not fits or not can_compile(layouts[0].tensor.device):
        return layerwise_torch
    from panda.optim import layerwise_triton

    return layerwise_triton
