"""Whether a step is taken, decided once its gradients are known and before any weight has changed."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Decision:
    """Whether the step is taken: asked once, at the first of the optimizers that would change weights."""

    def __init__(self, judge: Callable[[], bool] | None) -> None:
        self._judge = judge
        self.taken = True

    def ask(self) -> bool:
        """Whether the step is taken."""
        if self._judge is not None:
            judge, self._judge = self._judge, None
            self.taken = judge()
        return self.taken


@contextmanager
def deciding(optimizers: Sequence[torch.optim.Optimizer], judge: Callable[[], bool] | None) -> Iterator[Decision]:
    """In the meantime the first ``step`` of one of ``optimizers`` asks ``judge``; where that says no, none has effect.

    DeepSpeed's wrappers know the norm of all gradients by then, and what they do after it (they copy the master weights
    to the model, and drop the gradients) changes no weight that the optimizer did not change. Without a ``judge``
    nothing is done.
    """
    decision = Decision(judge)
    if judge is None:
        yield decision
        return

    def asking(step: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **keywords: step(*arguments, **keywords) if decision.ask() else None

    for optimizer in optimizers:
        optimizer.step = asking(optimizer.step)  # type: ignore[method-assign]
    try:
        yield decision
    finally:
        for optimizer in optimizers:
            del optimizer.step


class RandomState:
    """What the random generators of this process and its device were when it was made: those that checkpoints hold."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._python, self._numpy = random.getstate(), np.random.get_state()
        self._host = torch.get_rng_state()
        self._on_device = torch.cuda.get_rng_state(device) if self._device else None

    def restore(self) -> None:
        """Set the generators back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._host)
        if self._on_device is not None and self._device is not None:
            torch.cuda.set_rng_state(self._on_device, self._device)
