"""A lifecycle plugin of panda that marks what the bench measures. The bench names it in the runs that it starts.

It times through attributes of the engine that are private. Where they are no longer there, the parts of a step are
missing in the table, which says so.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from bench.gpu.marks import ENVIRONMENT
from bench.gpu.marks import Marks
from panda.registry import NoOptions
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext

if TYPE_CHECKING:
    from panda.runner import Run

STOP = "PANDA_BENCH_STOP"
"""Set: the process ends after its last step, before anything is saved."""


@register_plugin("bench-probe")
class Probe:
    """Marks steps, their parts and their batches, and the peak of memory."""

    acts = False  # it only watches

    def __init__(self, options: NoOptions, context: PluginContext) -> None:
        self.marks: Marks | None = None
        self.total = 0

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        processes, self.total = run.processes, run.plan.total_steps
        counts = processes.rank % processes.tensor_ranks == 0
        on_gpu = processes.device.type == "cuda"
        marks = self.marks = Marks(Path(os.environ[ENVIRONMENT]), processes.rank, on_gpu=on_gpu, counts=counts)
        with suppress(AttributeError):
            _count_batches(run.engine, marks)
        with suppress(AttributeError):
            marks.begin_forward_with(run.engine.module)
            marks.wrap(run.engine.deepspeed, "backward", "backward")
            marks.wrap(run.engine.deepspeed, "step", "optimizer")

    @hookimpl
    def panda_step_end(self, run: Run, step: int) -> None:
        assert self.marks is not None
        self.marks.step_end(step, last=step == self.total)
        if step == self.total and os.environ.get(STOP) and run.processes.rank:
            os._exit(0)

    @hookimpl(trylast=True)
    def panda_log(self, record: dict[str, Any]) -> None:
        if record["step"] == self.total and os.environ.get(STOP):
            os._exit(0)  # after the other plugins, so that the record is in metrics.jsonl

    @hookimpl
    def panda_run_end(self) -> None:
        assert self.marks is not None
        self.marks.end()

    @hookimpl
    def panda_exception(self) -> None:
        if self.marks is not None:
            self.marks.end("failed")


def _count_batches(engine: Any, marks: Marks) -> None:
    step = engine.step

    def counted(micro_batches: list[Any], *more: Any, **named: Any) -> Any:
        for batch in micro_batches:
            rows, length = batch.input_ids.shape
            marks.count(slots=rows * length, tokens=batch.tokens, supervised=batch.supervised_tokens)
        return step(micro_batches, *more, **named)

    engine.step = counted
