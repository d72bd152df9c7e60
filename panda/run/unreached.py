"""Says which trained weights have no gradient: of a branch that a model does not use, or that compiled code lost."""

from __future__ import annotations

from typing import Any

import torch

from panda.files.terminal import number_of
from panda.files.terminal import printable
from panda.run.state import Run

STEPS = 3
"""Looked at. In the first one half of an adapter has a gradient of zero, since its other half is zero."""
NAMED = 3
"""Weights that the note names."""


class Unreached:
    """Looks for trained weights whose gradients are zero in each of the first steps of a start.

    With torch 2.11 a step of split layers that were compiled trained the output head alone, in silence (2026-11-27).
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.steps = 0
        self.reached: dict[str, torch.Tensor] = {}
        named = [(name, weight) for name, weight in run.engine.module.named_parameters() if weight.requires_grad]
        self.weights = dict(named)
        self.handles = [self._hook(name, weight) for name, weight in named]

    def _hook(self, name: str, weight: Any) -> Any:
        """A hook on the gradient of ``weight`` that comes before DeepSpeed's, which takes the gradient away."""

        def note(weight: torch.Tensor) -> None:
            if weight.grad is not None:
                found = weight.grad.detach().any()
                self.reached[name] = self.reached[name] | found if name in self.reached else found

        handle = weight.register_post_accumulate_grad_hook(note)
        hooks = weight._post_accumulate_grad_hooks
        for number in [each for each in hooks if each != handle.id]:
            hooks[number] = hooks.pop(number)  # torch calls them in the order of insertion, whatever `move_to_end` did
        return handle

    def after_step(self) -> None:
        """Count a step. After the last that is looked at, say what had no gradient; the host waits for the device."""
        if not self.handles:
            return
        self.steps += 1
        if self.steps < STEPS:
            return
        reached = {name for name, found in self.reached.items() if bool(found)}
        missing = [name for name, weight in self.weights.items() if name not in reached and weight.requires_grad]
        if missing and self.run.processes.rank == 0:
            shown = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED:,} more" if len(missing) > NAMED else "")
            print(
                printable(
                    f"note: {len(missing):,} of {number_of(len(self.weights), 'trained weight')} had no gradient in the"
                    f" first {STEPS} steps, and may not be trained at all: {shown}"
                ),
                flush=True,
            )
        self.end()

    def end(self) -> None:
        """Look no longer."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.reached = [], {}
