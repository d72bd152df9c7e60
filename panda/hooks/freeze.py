"""The ``freeze`` plugin: weights that stay as they are, for the whole run or for some of its steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import NamedTuple

from panda.files.terminal import number_of
from panda.registry import UserError
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext

if TYPE_CHECKING:
    from panda.runner import Run


class Stretch(NamedTuple):
    """Steps in which the parameters that ``pattern`` matches are frozen."""

    pattern: str
    first: int
    last: int | None
    """None: the last of the run."""

    @property
    def when(self) -> str:
        """Its steps, in words."""
        if self.last is None:
            return "in all steps" if self.first == 1 else f"from step {self.first:,} on"
        return f"in steps {self.first:,} to {self.last:,}"


@dataclass(frozen=True)
class FreezeOptions:
    """Options of the freeze plugin."""

    freeze: tuple[str, ...]
    """Parameters to freeze, by patterns of their names (`*` is any text): `*embed*` in the whole run, `*embed*=1-100`
    in its first 100 steps, `*norm*=100-` from step 100 on."""

    def __post_init__(self) -> None:
        stretches(self.freeze)


def stretches(written: tuple[str, ...]) -> list[Stretch]:
    """The stretches that ``freeze`` says. Raises UserError for an item that is not PATTERN or PATTERN=FIRST-LAST."""
    found = []
    for text in written:
        pattern, equals, steps = text.partition("=")
        match = re.fullmatch(r"(\d*)-(\d*)", steps) if equals else re.fullmatch("()()", "")
        first, last = (int(match[1] or 1), int(match[2]) if match[2] else None) if match else (0, 0)
        if not pattern or first < 1 or (last is not None and last < first):
            raise UserError(
                f"freeze: {text!r} is not PATTERN or PATTERN=FIRST-LAST, with steps from 1 on: `*embed*=1-100`."
            )
        found.append(Stretch(pattern, first, last))
    return found


@register_plugin("freeze", options=FreezeOptions)
class Freeze:
    """Freezes parameters by name, for the whole run or between two steps. `--plugins freeze --freeze '*embed*=1-100'`.

    In every ZeRO stage and precision: their gradients are zero, in the norm of gradients too, and what the optimizer
    does to them (momentum, weight decay) is undone. That saves neither memory nor time. What the optimizer knows of
    them when they are trained again is of zeros.
    """

    acts = False  # it asks for nothing that ranks have to agree on

    def __init__(self, options: FreezeOptions, context: PluginContext) -> None:
        self.stretches = stretches(options.freeze)
        self.frozen: list[str] = []
        """Patterns of what is frozen now."""

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        for each in self.stretches:
            run.freeze([each.pattern])  # all of them once, so that a misspelt one is known at once
        run.unfreeze([each.pattern for each in self.stretches])
        self._set(run, run.step + 1)

    @hookimpl
    def panda_step_end(self, run: Run, step: int) -> None:
        self._set(run, step + 1)

    def _set(self, run: Run, step: int) -> None:
        """Freeze what is frozen in ``step``, and train the rest."""
        now = [each for each in self.stretches if each.first <= step and (each.last is None or step <= each.last)]
        due = [each.pattern for each in now]
        if due == self.frozen:
            return
        if self.frozen:
            run.unfreeze(self.frozen)
        names = run.freeze(due) if due else []
        self.frozen = due
        if run.processes.rank == 0 and step <= run.plan.total_steps:
            what = "no parameter is frozen"
            if names:
                what = f"{number_of(len(names), 'parameter is', 'parameters are')} frozen, {names[0]} among them"
            if len(names) == 1:
                what = f"{names[0]} is frozen"
            print(f"freeze: from step {step} on {what}", flush=True)
