"""The ``progress`` plugin: a bar in a terminal, plain lines elsewhere, and the results at the end."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING
from typing import Any

from panda.configuration.user_code import flags_of_files
from panda.files.activity import Activity
from panda.files.activity import activity
from panda.files.activity import as_fits
from panda.files.activity import duration
from panda.files.activity import is_terminal
from panda.files.activity import say
from panda.files.library_warnings import current
from panda.files.terminal import number_of
from panda.files.terminal import printable
from panda.hooks.metrics import read_evaluations
from panda.registry import NoOptions
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext
from panda.run.best_evaluation import is_finite
from panda.run.interruption import Interrupted
from panda.run.interruption import how_to_continue
from panda.tasks.task import Task
from panda.weights.run_folders import LOG

if TYPE_CHECKING:
    from panda.runner import Run

PLAIN_SECONDS = 2.0
"""Minimum time between two plain lines at the beginning; later it is PLAIN_SHARE of the time that has passed."""
PLAIN_SHARE, PLAIN_MOST = 0.02, 60.0
KEPT_SECONDS = 60.0
"""Between two lines in a terminal that stay there, above the line that moves."""
SMOOTHING = 0.9
"""Weight of the past in the loss that a terminal shows."""


@register_plugin("progress")
class ProgressDisplay:
    """Shows on rank 0 how far the run is, and at the end where everything is and what the model answers."""

    acts = False  # it only watches

    def __init__(self, options: NoOptions, context: PluginContext) -> None:
        self.shown = ExitStack()
        self.training: Activity | None = None
        self.last_line = 0.0
        self.begun_at = 0
        """The step of this start of the run."""
        self.mean, self.weight = 0.0, 0.0
        self.first: dict[str, Any] | None = None
        self.last: dict[str, Any] = {}
        self.best: dict[str, Any] | None = None
        self.evaluated: dict[str, Any] | None = None

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        if run.processes.rank != 0:
            return
        if not is_terminal():
            print("training ...", flush=True)
        self.begun_at = run.step
        if run.step:  # of the starts before this one
            for earlier in read_evaluations(run.directory):
                if earlier["step"] <= run.step:
                    self._compare(earlier)
        shown = activity("training", run.plan.total_steps, done=run.step, own_lines=True)
        self.training = self.shown.enter_context(shown)
        self.last_line = time.monotonic()

    @hookimpl
    def panda_step_end(self, run: Run, step: int) -> None:
        if self.training is not None:
            self.training.done = step

    @hookimpl
    def panda_log(self, run: Run, record: dict[str, Any]) -> None:
        self.first = self.first or record
        self.last = record
        if self.training is None:
            return
        facts = _facts(run, record)
        self.training.facts = [f"loss {self._smoothed(record['loss']):.4f}", _epoch(run, record), *facts]
        now, total = time.monotonic(), run.plan.total_steps
        apart = max(PLAIN_SECONDS, min(PLAIN_MOST, PLAIN_SHARE * self.training.seconds))
        if now - self.last_line >= (KEPT_SECONDS if is_terminal() else apart) or (
            not is_terminal() and (self.first is record or record["step"] == total)
        ):
            self.last_line = now
            left = self.training.left
            times = f"{duration(self.training.seconds)}, ETA {duration(left)}" if left is not None else ""
            said = [_time(), f"step {record['step']}/{total}", f"loss {record['loss']:.4f}"]
            if is_terminal():
                say(as_fits([*said, times, *facts], shutil.get_terminal_size().columns - 1))
            else:
                say("  ".join(filter(None, [*said, *facts, times])))

    def _smoothed(self, loss: float) -> float:
        """The moving average of the loss, without bias towards its start. What is not finite is shown, and left out."""
        if not math.isfinite(loss):
            return loss
        self.mean = SMOOTHING * self.mean + (1 - SMOOTHING) * loss
        self.weight = SMOOTHING * self.weight + (1 - SMOOTHING)
        return self.mean / self.weight

    def _compare(self, record: dict[str, Any]) -> None:
        loss = record["eval_loss"]
        if is_finite(loss) and (self.best is None or loss < self.best["eval_loss"]):
            self.best = record

    @hookimpl
    def panda_evaluation(self, run: Run, record: dict[str, Any]) -> None:
        if run.processes.rank != 0:
            return
        self.evaluated = record
        self._compare(record)
        shown = "".join(f"  {each} {record[name]:.4g}" for each in run.task.shown if (name := f"eval_{each}") in record)
        shown += "".join(f"  {name} {record[f'eval_{name}_loss']:.4f}" for name in run.evaluations if name)
        say(
            f"{_time()}  step {record['step']}/{run.plan.total_steps}  evaluation loss {record['eval_loss']:.4f}{shown}"
            f"  {record['eval_seconds']:.1f} s"
        )

    @hookimpl(trylast=True)
    def panda_run_end(self, run: Run) -> None:
        if run.processes.rank != 0:
            return
        self.shown.close()
        for line in self._summary(run):
            print(line)
        print(f"\n{run.directory}/")
        for name, what in _CONTENTS.items():
            if (run.directory / name).exists():
                print(f"  {name:18} {what}")
        if warned := current().summary():
            print(f"  {LOG:18} {warned}")
            current().said = True
        for answer in run.answers:
            text = f"\n> {answer['prompt']}\n{answer['answer']}"
            print(printable(text))
        if (run.directory / "export").is_dir():
            writes = run.answers or type(run.task).extend is Task.extend  # and learns no head in place of text
            print(f"\n{(_ASK * bool(writes) + _NEXT).format(run=shlex.quote(str(run.directory)))}")
        sys.stdout.flush()

    def _summary(self, run: Run) -> Iterator[str]:
        """What was reached, and how long it took."""
        if self.first is not None:
            first, last = (f"{record['loss']:.4f} at step {record['step']}" for record in (self.first, self.last))
            yield f"loss {first}, {last}"
        if self.evaluated is not None:
            best = self.best if self.best is not None and self.best["step"] != self.evaluated["step"] else None
            least = f", the least {best['eval_loss']:.4f} at step {best['step']}" if best else ""
            yield f"evaluation loss {self.evaluated['eval_loss']:.4f} at step {self.evaluated['step']}{least}"
        if self.last:
            took, steps = duration(time.perf_counter() - run.begun), self.last["step"] - self.begun_at
            tokens = number_of(self.last["tokens"], "token")
            more = f" since the run was resumed; {tokens} in all" if self.begun_at else f", {tokens}"
            yield f"{took} for {number_of(steps, 'step')}{more}"

    @hookimpl
    def panda_exception(self, run: Run, error: BaseException) -> None:
        self.shown.close()
        if run.processes.rank == 0 and not isinstance(error, Interrupted):  # which says it itself
            kept = run.newest_checkpoint
            print(f"the run stopped after step {run.step}, in {run.directory}", flush=True)
            if getattr(error, "says_how_to_go_on", False):
                return
            print(how_to_continue(run.directory, kept, flags_of_files(run.resolved)), flush=True)


def _facts(run: Run, record: Mapping[str, Any]) -> list[str]:
    """What a record says besides the loss, the most important first."""
    facts = [f"router loss {record['router_loss']:.4f}"] if "router_loss" in record else []
    facts += [f"{name} {record[name]:.4g}" for name in run.task.shown if name in record]
    facts += [f"{record['tokens_per_second']:,.0f} tokens/s"]
    facts += [f"MFU {record['mfu']:.1%}"] if "mfu" in record else []
    facts += [f"{record['memory_gib']:.1f} GiB"] if "memory_gib" in record else []
    return [*facts, f"lr {record['learning_rate']:.2e}", f"grad norm {record['grad_norm']:.3f}"]


def _epoch(run: Run, record: Mapping[str, Any]) -> str:
    """How many epochs are done, of those that the run has."""
    plan = run.plan
    return f"epoch {plan.step_end(record['step']) / plan.samples:.2f}/{plan.end_position / plan.samples:.4g}"


def _time() -> str:
    return time.strftime("%H:%M:%S")


_ASK = """to ask it:       panda generate {run} --prompt "..."
to chat with it: panda chat {run}
"""
_NEXT = """to look at it:   panda report {run}
to train longer: panda-train --resume {run} --max_steps N
"""

_CONTENTS = {
    "config.yaml": "the whole configuration; runs again as it stands",
    "provenance.json": "versions, and where each component and value came from",
    "deepspeed.json": "the configuration of DeepSpeed",
    "metrics.jsonl": "the log, one record a line",
    "loss.png": "the loss curve",
    "profile": "where the time of a step goes",
    "skipped.jsonl": "the steps that were skipped, with the rows that they had",
    "tensorboard": "for `tensorboard --logdir`",
    "checkpoints": "to resume from",
    "export": "the trained model and its tokenizer",
    "eval_answers.jsonl": "its answers to evaluation data, at each evaluation",
    "answers.json": "its answers to the prompts",
}
