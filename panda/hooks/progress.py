"""The ``progress`` plugin: a bar in a terminal, plain lines elsewhere, and the results at the end."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING
from typing import Any

from panda.configuration.user_code import flags_of_files
from panda.files.terminal import printable
from panda.registry import NoOptions
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext
from panda.run.interruption import Interrupted
from panda.run.interruption import how_to_continue

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from panda.runner import Run

PLAIN_SECONDS = 2.0
"""Minimum time between two plain lines."""


@register_plugin("progress")
class ProgressDisplay:
    """Shows on rank 0 how far the run is, and at the end where everything is and what the model answers."""

    acts = False  # it only watches

    def __init__(self, options: NoOptions, context: PluginContext) -> None:
        self.bar: RichProgress | None = None
        self.bar_task: Any = None
        self.last_line = 0.0
        self.first: dict[str, Any] | None = None
        self.last: dict[str, Any] = {}
        self.evaluated: dict[str, Any] | None = None

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        if run.processes.rank != 0:
            return
        if sys.stdout.isatty():
            self._open_bar(run)
        else:
            print("training ...", flush=True)

    @hookimpl
    def panda_log(self, run: Run, record: dict[str, Any]) -> None:
        self.first = self.first or record
        self.last = record
        router = f"  router loss {record['router_loss']:.4f}" if "router_loss" in record else ""
        shown = "".join(f"  {name} {record[name]:.4g}" for name in run.task.shown if name in record)
        text = (
            f"loss {record['loss']:.4f}{router}{shown}  lr {record['learning_rate']:.2e}"
            f"  grad norm {record['grad_norm']:.3f}  {record['tokens_per_second']:,.0f} tokens/s"
        )
        if "mfu" in record:
            text += f"  MFU {record['mfu']:.1%}"
        if "memory_gib" in record:
            text += f"  {record['memory_gib']:.1f} GiB"
        if self.bar is not None:
            self.bar.update(self.bar_task, completed=record["step"], description=text)
            return
        total = run.plan.total_steps
        now = time.monotonic()
        if now - self.last_line >= PLAIN_SECONDS or record["step"] in (1, total):
            self.last_line = now
            print(f"step {record['step']}/{total}  {text}", flush=True)

    @hookimpl
    def panda_evaluation(self, run: Run, record: dict[str, Any]) -> None:
        if run.processes.rank != 0:
            return
        self.evaluated = record
        shown = "".join(f"  {each} {record[name]:.4g}" for each in run.task.shown if (name := f"eval_{each}") in record)
        line = (
            f"step {record['step']}/{run.plan.total_steps}  evaluation loss {record['eval_loss']:.4f}{shown}"
            f"  {record['eval_seconds']:.1f} s"
        )
        if self.bar is not None:
            self.bar.console.print(line, highlight=False)
        else:
            print(line, flush=True)

    @hookimpl(trylast=True)
    def panda_run_end(self, run: Run) -> None:
        if run.processes.rank != 0:
            return
        self._close_bar()
        if self.first is not None:
            first, last = (f"{record['loss']:.4f} at step {record['step']}" for record in (self.first, self.last))
            print(f"loss {first}, {last}")
        if self.evaluated is not None:
            print(f"evaluation loss {self.evaluated['eval_loss']:.4f} at step {self.evaluated['step']}")
        print(f"\n{run.directory}/")
        for name, what in _CONTENTS.items():
            if (run.directory / name).exists():
                print(f"  {name:16} {what}")
        for answer in run.answers:
            text = f"\n> {answer['prompt']}\n{answer['answer']}"
            print(printable(text))
        sys.stdout.flush()

    @hookimpl
    def panda_exception(self, run: Run, error: BaseException) -> None:
        self._close_bar()
        if run.processes.rank == 0 and not isinstance(error, Interrupted):  # which says it itself
            kept = [path for path in (run.resumed_from, *run.checkpoints) if path is not None and path.exists()]
            print(f"the run stopped after step {run.step}, in {run.directory}", flush=True)
            if kept:
                print(how_to_continue(run.directory, kept[-1], flags_of_files(run.resolved)), flush=True)
            else:
                print("no checkpoint was saved, so it cannot be continued: set `save_minutes`", flush=True)

    def _open_bar(self, run: Run) -> None:
        from rich.progress import BarColumn
        from rich.progress import MofNCompleteColumn
        from rich.progress import Progress as RichProgress
        from rich.progress import TextColumn
        from rich.progress import TimeRemainingColumn

        self.bar = RichProgress(
            BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
        )
        self.bar_task = self.bar.add_task("", total=run.plan.total_steps, completed=run.step)
        self.bar.start()

    def _close_bar(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


_CONTENTS = {
    "config.yaml": "the whole configuration; runs again as it stands",
    "provenance.json": "versions, and where each component and value came from",
    "deepspeed.json": "the configuration of DeepSpeed",
    "metrics.jsonl": "the log, one record a line",
    "loss.png": "the loss curve",
    "profile": "where the time of a step goes",
    "tensorboard": "for `tensorboard --logdir`",
    "checkpoints": "to resume from",
    "export": "the trained model and its tokenizer",
    "answers.json": "its answers to the prompts",
}
