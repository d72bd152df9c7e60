"""The loop: optimizer steps, records, evaluations and checkpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from panda.configuration.user_code import flags_of_files
from panda.data.batches import Batch
from panda.data.loading import step_batches
from panda.data.packing import Layout
from panda.data.workers import workers_standing
from panda.engine.checkpoints.folders import checkpoint_name
from panda.engine.checkpoints.folders import complete_checkpoints
from panda.engine.checkpoints.in_use import make_lasting
from panda.engine.checkpoints.manifest import Progress
from panda.engine.checkpoints.reading import refuse_unreadable
from panda.engine.checkpoints.writing import finish_save
from panda.engine.checkpoints.writing import save_checkpoint
from panda.engine.metrics import refuse_loss
from panda.engine.steps import StepResult
from panda.engine.watchdog import ask_for_batches
from panda.engine.watchdog import is_ending
from panda.engine.watchdog import trouble
from panda.files.activity import Activity
from panda.files.activity import activity
from panda.files.activity import say
from panda.files.activity import stand
from panda.files.terminal import printable
from panda.registry import UserError
from panda.run.extra_state import states_of
from panda.run.extra_state import write_state
from panda.run.garbage import collect
from panda.run.garbage import collected_between_steps
from panda.run.interruption import PASSED_ON
from panda.run.interruption import Interrupted
from panda.run.interruption import Interruption
from panda.run.interruption import how_to_continue
from panda.run.records import Clock
from panda.run.records import Gpu
from panda.run.records import add_to
from panda.run.records import as_number
from panda.run.records import evaluation_record
from panda.run.records import is_recorded
from panda.run.records import log_record
from panda.run.rehearsal import rehearse_longest
from panda.run.skipped import ended_on_skipped
from panda.run.skipped import ends_on_skipped
from panda.run.skipped import too_many
from panda.run.state import Run
from panda.run.unreached import Unreached
from panda.tasks.task import Task
from panda.tasks.task import stated_metrics
from panda.weights.run_folders import CHECKPOINTS

SECONDS_A_MINUTE, SECONDS_AN_HOUR = 60, 3600


class Loop:
    """Trains a run from where it is to its last step. Reads numbers from the device only to log or save them."""

    def __init__(self, run: Run, start: Progress) -> None:
        """``start``: the progress of the checkpoint that the run continues."""
        self.run = run
        self.options = run.options
        self.loss, self.statistics = _attributed(run, "loss"), None
        if type(run.task).statistics is not Task.statistics:
            self.statistics = _attributed(run, "statistics")
        stated = stated_metrics(run.task)
        run.engine.stated_metrics = None if stated is None else (*stated,)
        self.makes_samples = type(run.task).rollout is not Task.rollout
        self.clock = Clock(start)
        self.gpu = Gpu.of(run)
        self.counts = torch.tensor([start.tokens, start.units], dtype=torch.float64)
        self.counts = self.counts.to(run.processes.device)
        self.skipped, self.left_out = start.skipped_steps, start.left_out_steps
        run.skipped_in_a_row = start.skipped_in_a_row
        self.skipped_since_saved = 0
        """Of the steps since the last checkpoint, those that were skipped."""
        if run.hooks.has("panda_gradients") and not run.engine.judges:
            raise UserError(
                "guard_spike: no step can be skipped under ZenFlow, which steps weights outside of the optimizer. Take"
                " `zenflow` out of `deepspeed_config`; or leave out `guard_spike`, and plugins that have the hook"
                " panda_gradients."
            )
        self.begun_at = start.step
        self.saved_step = start.step if run.resumed_from else -1
        self.saved_at = self.clock.time
        self.unrecorded = dict(run.spent)
        """Seconds of saving and resuming that no record has yet."""
        self.evaluated_step = self.logged_step = -1
        self.has_tried_state = False
        self.evaluation_due = start.evaluation_due
        self.time_to_save = self.regular_save_due = False
        """Whether `save_minutes`, and `save_steps`, have a checkpoint written of the next step that is taken."""
        self.interruption = Interruption(
            launched=run.processes.world_size > 1 or PASSED_ON in os.environ,
            announce=run.processes.rank == 0,
            hopeless=trouble,
            is_ending=is_ending,
        )
        self.ended_by: str | None = None
        """What has the run save and end from outside, agreed by all ranks."""

    def train(self) -> None:
        """Take the remaining steps, or those until a hook stops the run; evaluate and save at the end.

        Raises Interrupted, on all ranks, if a signal or ``max_train_hours`` ends it before; then it has saved.
        """
        run, first = self.run, self.run.step + 1
        stand("before the first step of this start")
        ask_for_batches(workers_standing)
        with run.resolved.components["task"].attributed("`start`"):
            run.task.start(run)
        with self.interruption.listening():
            with collected_between_steps():
                if self.evaluation_due and run.stopped is None:
                    self.evaluate()
                if run.save_is_due and run.resumed_from is not None:  # of the step that the run goes on from
                    self.save()
                if run.stopped is None:
                    self.rehearse()
                    unreached = Unreached(run)  # by what is trained on, and not by what was rehearsed
                    for step, micro_batches in enumerate(self.clock.waiting_for(batches(run, run.layout)), first):
                        self.step(step, micro_batches)
                        if run.applied:
                            unreached.after_step()
                        collect(step)
                        if run.stopped is not None or self.is_interrupted:
                            break
            if not self.is_interrupted and self.evaluated_step != run.step:  # no step, or a hook has stopped it since
                self.evaluate()
            wanted = self.options.save_final or self.regular_save_due or self.is_interrupted
            if run.save_is_due or (wanted and self.saved_step != run.step and self.is_worth_saving()):
                self.save()
            elif run.step == first - 1 and self.saved_step == run.step and not run.skipped_in_a_row:
                folder, keep = run.directory / CHECKPOINTS, self.options.save_total_limit
                finish_save(run.processes, folder, run.step, keep=keep, kept=run.kept)
            if self.ended_by is None:
                self.listen_outside()  # since the last step: then the export is still to do
        self.say_stop()
        if self.is_interrupted:
            raise Interrupted(self.how_it_goes_on())
        if ends_on_skipped(run):
            raise ended_on_skipped(run)

    def rehearse(self) -> None:
        """Find out before the next step whether there is memory for the longest micro batch of the run.

        Not of a task that makes its samples while it trains: how long they will be is not known.
        """
        begun = time.perf_counter()
        if not self.makes_samples:
            rehearse_longest(self.run, self.loss, self.statistics)
        self.clock.leave_out(time.perf_counter() - begun)

    def step(self, step: int, micro_batches: list[Batch]) -> None:
        """Take optimizer step ``step`` (counted from 1), then log, evaluate and save if they are due."""
        run, options, plan = self.run, self.options, self.run.plan
        stand(f"step {step:,}")
        made = self.made(micro_batches, step)
        run.at("panda_step_start", step=step, batches=made)
        factor = run.schedule(step - 1) * run.learning_rate_factor
        result = None if run.left_out else self.trained(made, factor)
        run.step = step
        run.applied = result is not None and result.applied
        if run.applied and not self.has_tried_state:
            self.has_tried_state = True
            whose = run.resolved.components["optimizer"].offer.describe()
            refuse_unreadable([dict(each) for each in run.engine.own_optimizer.state.values()], whose)
        run.loss, run.grad_norm = (None, None) if result is None else (result.loss, result.grad_norm)
        if result is None:
            self.leave_out()
        run.at("panda_step_end", step=step)
        run.left_out = None
        self.listen_outside()
        is_last = step == plan.total_steps
        if step % options.logging_steps == 0 or is_last or run.stopped or self.ended_by:
            self.log(result, factor * options.learning_rate)
        if self.run.skipped_in_a_row >= run.most_skipped:
            if self.is_worth_saving():
                self.save()
            raise too_many(run)
        # Before saving, so that a run that resumes this checkpoint already has the record. An interrupted run saves
        # first, since it may be killed soon.
        self.evaluation_due = bool(is_last or run.stopped or (options.eval_steps and step % options.eval_steps == 0))
        is_long = self.evaluation_due and not self.is_interrupted
        if is_long:
            self.evaluate()
        for epoch in range(plan.step_end(step - 1) // plan.samples, plan.step_end(step) // plan.samples):
            run.at("panda_epoch_end", epoch=epoch)
        if run.stopped:  # perhaps since the record was due
            self.log(result, factor * options.learning_rate)
        self.regular_save_due |= bool(options.save_steps and step % options.save_steps == 0)
        # What nobody has asked for waits for a step that is taken: a skipped one has changed nothing.
        if run.save_is_due or ((self.regular_save_due or self.time_to_save) and not run.skipped_in_a_row):
            self.save()
            is_long = True
        if run.stopped:
            self.log(result, factor * options.learning_rate)
        if is_long and not self.is_interrupted:
            self.listen_outside()  # in the meantime a signal may have come: then there is no further step
        stand(f"after step {step:,}")

    def listen_outside(self) -> None:
        """Agree on what the ranks have heard from outside, and on what rank 0 reads from the clock."""
        run, options, now = self.run, self.options, time.perf_counter()
        begun_by_rank_0 = run.processes.rank == 0
        hours, minutes = options.max_train_hours, options.save_minutes
        is_over = begun_by_rank_0 and hours is not None and now - run.begun >= hours * SECONDS_AN_HOUR
        is_time = begun_by_rank_0 and minutes > 0 and now - self.saved_at >= minutes * SECONDS_A_MINUTE
        is_lost = begun_by_rank_0 and run.lock.is_lost()
        signalled, over, due, lost = run.processes.most([self.interruption.signal or 0, is_over, is_time, is_lost])
        self.time_to_save = bool(due)
        if self.ended_by is None and (signalled or over):
            self.ended_by = Signals(int(signalled)).name if signalled else f"max_train_hours: {hours:g}"
        if lost and run.make_again is not None:
            self.ended_by = f"{run.directory} was removed while the run used it"
            run.directory = run.processes.from_rank_0(run.make_again)

    @property
    def is_interrupted(self) -> bool:
        """Whether the run ends from outside: not one that a hook has stopped, which ends anyway."""
        return self.ended_by is not None and self.run.stopped is None

    def is_worth_saving(self) -> bool:
        """Whether a step since the last checkpoint was taken, or left out: not where all were skipped."""
        return self.run.step == 0 or self.run.step - max(self.saved_step, 0) > self.skipped_since_saved

    def how_it_goes_on(self) -> str:
        """What to print of a run that was interrupted."""
        run = self.run
        how = f"{self.ended_by}: the run has ended after step {run.step:,} of {run.plan.total_steps:,}"
        kept = run.newest_checkpoint
        if kept is None:
            return f"{how}. There is no checkpoint to continue from, since no step has changed the weights"
        return f"{how}, and {kept} is saved\n{how_to_continue(run.directory, kept, flags_of_files(run.resolved))}"

    def trained(self, micro_batches: list[Batch], factor: float) -> StepResult:
        """The optimizer step over ``micro_batches``, with ``factor`` of the peak learning rate."""
        engine = self.run.engine
        engine.scale_learning_rate(factor)
        judge = self.judged if self.run.hooks.has("panda_gradients") else None
        result = engine.step(micro_batches, self.loss, self.statistics, judge)
        self.counts += result.counts
        self.skipped += not result.applied
        self.skipped_since_saved += not result.applied
        self.run.skipped_in_a_row = 0 if result.applied else self.run.skipped_in_a_row + 1
        return result

    def judged(self, loss: torch.Tensor, grad_norm: torch.Tensor | float) -> bool:
        """Whether the step that is under way is taken: no hook on any rank has it skipped."""
        self.run.at("panda_gradients", step=self.run.step + 1, loss=loss, grad_norm=grad_norm)
        return self.run.left_out is None

    def leave_out(self) -> None:
        """Count and print that the step that has just passed was left out, for the reason in ``run.left_out``."""
        run = self.run
        self.left_out += 1
        if run.processes.rank == 0:
            print(printable(f"step {run.step} is left out ({run.left_out})"), flush=True)

    def say_stop(self) -> None:
        """Print why the run has ended, if that is before its last step."""
        run = self.run
        if run.stopped is None:
            return
        if run.step >= run.plan.total_steps:  # it has ended by itself
            run.stopped = None
        elif run.processes.rank == 0:
            by, reason = run.stopped.by, run.stopped.reason
            print(printable(f"stopped after step {run.step} of {run.plan.total_steps} by {by}: {reason}"), flush=True)

    def progress(self) -> Progress:
        """How far the run has come. Waits for the device."""
        tokens, units = self.counts.tolist()
        run, cursor = self.run, self.run.plan.step_end(self.run.step)
        return Progress(
            run.step,
            cursor,
            int(tokens),
            as_number(units),
            self.skipped,
            left_out_steps=self.left_out,
            learning_rate_factor=run.learning_rate_factor,
            evaluation_due=self.evaluation_due and self.evaluated_step != run.step,
            skipped_in_a_row=self.run.skipped_in_a_row,
        )

    def made(self, micro_batches: list[Batch], step: int, *, training: bool = True) -> list[Batch]:
        """What the task makes of ``micro_batches`` before optimizer step ``step``, if it makes its own samples."""
        if not self.makes_samples:
            return micro_batches
        run = self.run
        with run.resolved.components["task"].attributed("`rollout`"):
            made = run.task.rollout(micro_batches, step, training=training)
        counts = run.processes.from_all(len(made))
        if len(set(counts)) > 1 or not made:
            raise UserError(f"task: `rollout` returned {counts} batches on the ranks of the run. Return equally many.")
        return made

    def log(self, result: StepResult | None, learning_rate: float) -> None:
        """Give hooks the record of the last step, once, on rank 0; None for one that was left out, which has none."""
        run = self.run
        if run.processes.rank != 0 or result is None or self.logged_step == run.step:
            return
        run.observations = run.engine.observations()
        record = log_record(
            result, self.progress(), learning_rate, self.clock, run.observations, unit=run.task.unit, gpu=self.gpu
        )
        record |= self.unrecorded
        self.unrecorded.clear()
        add_to(record, run.added)
        self.logged_step = run.step
        run.hook.panda_log(run=run, record=record)

    def save(self) -> None:
        """Write a checkpoint, unless it is there already; then remove older ones. Every rank has to call it.

        None is removed for one of a skipped step: a run whose gradients stay NaN keeps what it had before.
        """
        run, begun = self.run, time.perf_counter()
        folder = run.directory / CHECKPOINTS
        path = folder / checkpoint_name(run.step)
        is_there = self.saved_step == run.step  # here, or in the directory of another run, which this one continues
        is_there = is_there and run.processes.from_rank_0(lambda: path in complete_checkpoints(folder))
        ends = self.options.save_final and (run.stopped is not None or run.step == run.plan.total_steps)
        if not is_there:
            with activity(f"saving step {run.step:,}"):
                save_checkpoint(
                    run.engine,
                    folder,
                    self.progress(),
                    run.agreement,
                    passing=self.time_to_save and not (run.save_is_due or self.regular_save_due or ends),
                    write=partial(write_state, run, states_of(run)),
                )
            run.checkpoints.append(path)
        self.saved_step, self.regular_save_due, self.skipped_since_saved = run.step, False, 0
        run.at("panda_checkpoint_saved", path=path)
        if run.save_is_due:
            run.processes.from_rank_0(partial(make_lasting, path))
        run.save_is_due = False  # also where a hook has just asked for this one
        if not run.skipped_in_a_row:
            finish_save(run.processes, folder, run.step, keep=self.options.save_total_limit, kept=run.kept)
        collect()
        self.saved_at = time.perf_counter()
        self.clock.leave_out(self.saved_at - begun)
        for seconds in (run.spent, self.unrecorded):
            seconds["save_seconds"] = round(seconds.get("save_seconds", 0) + self.saved_at - begun, 3)
        run.processes.together(lambda: _refuse_unsaved(run.unsaved, path))

    def evaluate(self) -> None:
        """Compute the loss on each set of held-out data. Draws no random numbers, and does not affect training."""
        run, begun = self.run, time.perf_counter()
        self.evaluated_step, self.evaluation_due = run.step, False
        if not run.evaluations:
            return
        due, run.added = run.added, {}
        run.at("panda_evaluation_start")
        passes = sum(each.plan.total_steps for each in run.evaluations.values()) * (2 if self.statistics else 1)
        with activity(f"evaluating after step {run.step:,}", passes) as shown, run.using_evaluated_weights():
            found = {
                name: run.engine.evaluate(_Evaluation(self, layout, shown), self.loss, self.statistics)
                for name, layout in run.evaluations.items()
            }

        def recorded() -> dict[str, Any]:
            record = evaluation_record(run.step, found, run.task.unit, begun)
            add_to(record, run.added, "eval_")
            return record

        # What acts decides by it, so its last bit and its time must be the same everywhere.
        record = run.processes.from_rank_0(recorded) if run.hooks.acts("panda_evaluation") else recorded()
        run.added = due
        # A run that was killed after its last step, before it had exported, is evaluated once more when it goes on.
        goes_on = run.resumed_from is not None and run.step == self.begun_at
        run.evaluation_is_recorded = goes_on and run.processes.rank == 0 and is_recorded(run.directory, record)
        run.at("panda_evaluation", record=record)
        collect()
        self.clock.leave_out(time.perf_counter() - begun)


def _refuse_unsaved(failures: Sequence[Exception], path: Path) -> None:
    """Raise the first of ``failures``, for which the checkpoint at ``path`` has no state of a plugin."""
    if failures:
        say(f"note: {path} is complete but for the state of a plugin that failed")
        raise failures[0]


@dataclass(frozen=True)
class _Evaluation:
    """The micro batches of an evaluation, from the beginning each time that they are asked for."""

    loop: Loop
    layout: Layout
    shown: Activity

    def __iter__(self) -> Iterator[Batch]:
        run = self.loop.run
        for some in batches(run, self.layout):
            yield from self.loop.made(some, run.step, training=False)
            self.shown.advance()


def _attributed(run: Run, method: str) -> Callable[..., Any]:
    """A method of the task that calls the model: errors name the packages of both, unless the model is panda's."""
    task, model = run.resolved.components["task"], run.resolved.components["model"]
    called = f" (which calls {model.label} of {model.offer.distribution} {model.offer.version})"
    part = f"the {method}" + called * (not model.offer.is_own)
    of_task = getattr(run.task, method)

    def call(module: Any, *batch: Any) -> Any:
        with task.attributed(part):
            returned = of_task(module, *batch)
        if method == "loss":
            refuse_loss(returned, task.offer.describe())
        return returned

    return call


def batches(run: Run, layout: Layout) -> Iterator[list[Batch]]:
    """The micro batches of this rank in each step of ``layout``."""
    return step_batches(
        layout,
        run.collate,
        rank=run.processes.data_rank,
        num_workers=run.options.num_workers,
        prefetch_factor=run.options.prefetch_factor,
        pin_memory=run.processes.device.type == "cuda",
        **run.told_of_rows,
    )
