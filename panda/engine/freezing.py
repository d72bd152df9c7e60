"""Weights that stay as they are for some steps of a run.

DeepSpeed's wrappers fix at the start which parameters are trained, and put many of them into one tensor. So a frozen
parameter keeps its gradient, which is zero, and what the optimizer does to its master weights all the same (momentum,
weight decay) is undone before DeepSpeed copies these to the model. That saves neither memory nor time.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from panda.engine.parameter_layouts import check_values
from panda.engine.parameter_layouts import read_layout
from panda.registry import UserError


def trained_names(module: torch.nn.Module) -> list[str]:
    """The names of the parameters of ``module`` that are trained."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Those of ``names``, of trained parameters, that ``patterns`` match. Raises UserError where one matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
            raise UserError(f"freeze: {pattern!r} matches no parameter that is trained. These are: {shown}.")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


class Freezing:
    """Which parameters of a module are frozen, of those that its optimizer steps."""

    def __init__(self, module: torch.nn.Module, optimizer: Any, own_optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer, self.own_optimizer = module, optimizer, own_optimizer
        self._gradients: dict[str, Any] = {}
        """By name, the handle of what makes the gradient of a frozen parameter zero."""
        self._held: dict[int, list[tuple[str, torch.Tensor, torch.Tensor]]] = {}
        """By the identity of a tensor that is stepped, its frozen stretches: the parameter, the stretch, its values."""
        self._after: list[Any] = []

    @property
    def names(self) -> list[str]:
        """The frozen parameters."""
        return list(self._gradients)

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """The trained parameters that ``patterns`` match. Raises UserError for a pattern that matches none of them."""
        return matching(trained_names(self.module), patterns)

    def freeze(self, names: Sequence[str]) -> None:
        """Keep the parameters called ``names`` as they are from now on.

        Raises UserError under ZenFlow, and for an optimizer that evaluates other weights than it trains with.
        """
        if hasattr(self.own_optimizer, "eval_weights"):
            raise UserError(
                "freeze: this optimizer evaluates an average of weights that are not those that freezing keeps. Take"
                " `optimizer: adamw`."
            )
        if getattr(self.optimizer, "zenflow", False):
            raise UserError(
                "freeze: ZenFlow steps weights outside of the optimizer, which panda cannot undo. Take `zenflow` out of"
                " `deepspeed_config`."
            )
        parameters = dict(self.module.named_parameters())
        for name in names:
            if name not in self._gradients:
                self._gradients[name] = parameters[name].register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]
        self._hold()

    def unfreeze(self, names: Sequence[str]) -> None:
        """Train the parameters called ``names`` again."""
        for name in names:
            if handle := self._gradients.pop(name, None):
                handle.remove()
        self._hold()

    def _hold(self) -> None:
        """Keep the values of what is frozen now."""
        for handle in self._after:
            handle.remove()
        self._after = []
        held = defaultdict(list)
        if self._gradients:
            _, layouts = read_layout(self.module, self.optimizer)
            check_values(self.module, layouts)
            for layout in layouts:
                flat = layout.tensor.detach().view(-1)
                for segment in layout.segments:
                    name = layout.parameters[segment.parameter]
                    if name in self._gradients:
                        stretch = flat[segment.start : segment.start + segment.length]
                        held[id(layout.tensor)].append((name, stretch, stretch.clone()))
            # Called after `step` of the optimizer itself, before DeepSpeed copies master weights to the model. With a
            # `ratio` of offloading below 1 it has a second one.
            stepped = [self.own_optimizer, getattr(self.optimizer, "backup_optimizer", None)]
            self._after = [each.register_step_post_hook(self._restore) for each in stepped if each is not None]
        self._held = dict(held)

    @torch.no_grad()
    def _restore(self, optimizer: torch.optim.Optimizer, *called: Any) -> None:
        for group in optimizer.param_groups:  # under ZeRO-1 and 2 those of one group of parameters at a time
            for tensor in group["params"]:
                for _, stretch, values in self._held.get(id(tensor), ()):
                    stretch.copy_(values)
