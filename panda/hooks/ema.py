"""The ``ema`` plugin: a moving average of the weights, which is evaluated and exported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

from panda.registry import Meta
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext

if TYPE_CHECKING:
    from panda.engine.weights_copy import WeightsCopy
    from panda.runner import Run


@dataclass(frozen=True)
class EmaOptions:
    """Options of the ema plugin."""

    ema_decay: Annotated[float, Meta(ge=0, lt=1)] = 0.999
    """What remains of the average at each step. In the first ones it is less, (1 + n) / (10 + n) after n of them, so
    that the weights that the run began with are soon forgotten."""


@register_plugin("ema", options=EmaOptions)
class Ema:
    """Averages the weights over the steps; the average is evaluated, asked and exported. `--plugins ema`.

    Training is that without it, to the bit. Checkpoints have both: `panda export` and `panda generate` take the
    average, and `panda export --trained` the other weights. The average is in fp32 and takes as much memory as the
    master weights, partitioned like them.
    """

    acts = False  # it asks for nothing that ranks have to agree on
    weights_copies = 1  # for the estimate of memory

    def __init__(self, options: EmaOptions, context: PluginContext) -> None:
        self.decay = options.ema_decay
        self.average: WeightsCopy | None = None
        self.updates = 0

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        if self.average is None:
            self.average = run.weights_copy()
        run.evaluate_with(self.average)

    @hookimpl
    def panda_step_end(self, run: Run) -> None:
        if run.applied and self.average is not None:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            self.average.move_towards_trained(1 - decay)
            self.updates += 1

    @hookimpl
    def panda_save_state(self, run: Run) -> dict[str, Any]:
        return {"average": self.average, "updates": self.updates}

    @hookimpl
    def panda_load_state(self, run: Run, state: dict[str, Any]) -> None:
        self.average, self.updates = state["average"], state["updates"]
