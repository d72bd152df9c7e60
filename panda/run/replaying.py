"""A step of a run again, and of each of its samples the loss and the gradient."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median

from panda.configuration.configure import Configuration
from panda.data.batches import Batch
from panda.data.loading import batch_of
from panda.data.places import place_of
from panda.engine.processes import join_processes
from panda.engine.steps import StepResult
from panda.files.activity import activity
from panda.files.terminal import number_of
from panda.registry import UserError
from panda.run.assembly import lay_out
from panda.run.beginning import begin
from panda.run.continuation import continuation_of
from panda.run.directory_lock import RunLock
from panda.run.loop import Loop
from panda.run.loop import batches
from panda.run.preparation import prepare
from panda.run.state import Run
from panda.run.trained_model import trained_model

STANDS_OUT = 10
"""Times the median of the others: a loss or a gradient that is larger stands out."""
TEXT = 60
"""Characters of a sample that are shown."""


@dataclass(frozen=True)
class Part:
    """A sample of a step, or samples of which the task makes its own."""

    where: str
    """FILE:ROW, or the numbers of the samples."""
    text: str
    """The beginning of its text; empty where the task does not show it."""
    units: float
    """Of the loss: supervised tokens, say."""
    loss: float
    """Per unit."""
    grad_norm: float
    """Of its part of the gradient of the step: that of its loss, times its share of the units of the step."""

    @property
    def is_finite(self) -> bool:
        return isfinite(self.loss) and isfinite(self.grad_norm)


@dataclass(frozen=True)
class Replayed:
    """A step that was run again."""

    after: int
    """Steps that the weights had taken when the step was run again."""
    loss: float
    grad_norm: float
    units: float
    unit: str
    """What these are, in the plural."""
    parts: Sequence[Part]

    @property
    def responsible(self) -> list[Part]:
        """The parts that are not finite; otherwise those whose loss or gradient is far above the others'."""
        if broken := [part for part in self.parts if not part.is_finite]:
            return broken
        if len(self.parts) < 2:
            return []
        # Of the others: the median is the same without any one of the larger half, such as the largest.
        losses = median(sorted(part.loss for part in self.parts)[:-1])
        norms = median(sorted(part.grad_norm for part in self.parts)[:-1])
        return [
            part for part in self.parts if part.loss > STANDS_OUT * losses or part.grad_norm > STANDS_OUT * norms > 0
        ]


def replay(
    configuration: Configuration,
    world_size: int,
    step: int,
    skipped: frozenset[int],
    *,
    between: bool,
) -> Replayed:
    """Step ``step``, counted from 1, of the run that ``configuration`` continues, again. Every rank has to call it.

    ``between``: take the steps before it that the checkpoint lacks; of these the ``skipped`` ones change nothing.
    Otherwise the step is run on the weights of the checkpoint. Hooks are not called. The run directory of
    ``configuration`` is written to, and is not the run's own. Raises UserError if the run has no such step.
    """
    with _begun(configuration, world_size) as (run, loop):
        if step > run.plan.total_steps:
            raise UserError(f"STEP: the run has {number_of(run.plan.total_steps, 'step')}, and no step {step:,}.")
        found: list[Batch] = []
        with activity(f"taking the steps before step {step:,}", step - 1, done=run.step) as shown:
            for number, found in enumerate(batches(run, run.layout), run.step + 1):
                if number == step:
                    break
                if between:
                    _take(loop, found, number, _never if number in skipped else None)
                    run.step = shown.done = number
        made = loop.made(found, step)
        whole = _take(loop, made, step, _never)
        units = float(whole.counts[1])
        parts = list(_each_made(loop, made, step, units) if loop.makes_samples else _each_sample(loop, step, units))
        return Replayed(run.step, float(whole.loss), float(whole.grad_norm), units, run.task.unit, parts)


@contextmanager
def _begun(configuration: Configuration, world_size: int) -> Iterator[tuple[Run, Loop]]:
    """The run, as it is before its next step, and its loop."""
    prepared = prepare(configuration, world_size)
    processes = join_processes(prepared.options.tensor_parallel_size)
    prepared.decide(processes)
    with RunLock() as lock:
        continuation = continuation_of(prepared, processes, lock)
        layout = lay_out(prepared.options, prepared.dataset, processes.data_ranks, continuation.progress)
        model = trained_model(prepared, layout, processes)
        run = begin(prepared, continuation, (layout, {}), model, processes, lock)
        try:
            run.task.start(run)
            yield run, Loop(run, continuation.progress)
        finally:
            run.engine.close()


def _never(*found: object) -> bool:
    return False


def _take(loop: Loop, micro_batches: list[Batch], step: int, judge: Callable[..., bool] | None) -> StepResult:
    run = loop.run
    run.engine.scale_learning_rate(run.schedule(step - 1) * run.learning_rate_factor)
    return run.engine.step(micro_batches, loop.loss, loop.statistics, judge)


def _each_sample(loop: Loop, step: int, units: float) -> Iterator[Part]:
    """Each sample of ``step``, alone on one rank; the others run the same one, and count nothing."""
    run, layout = loop.run, loop.run.layout
    numbers = [number for of_ranks in layout.micro_batches(step) for rows in of_ranks for row in rows for number in row]
    with activity("running each sample", len(numbers)) as shown:
        for number in numbers:
            batch = batch_of(layout, run.collate, [number], **run.told_of_rows)
            found = _take(loop, [batch if run.processes.data_rank == 0 else batch.as_idle()], step, _never)
            shown.advance()
            yield _part(_where(run, number), _text(run, number), found, units)


def _each_made(loop: Loop, made: list[Batch], step: int, units: float) -> Iterator[Part]:
    """Each micro batch of ``step``, of a task that makes its own samples of those of the data."""
    run = loop.run
    for number, (batch, of_ranks) in enumerate(zip(made, run.layout.micro_batches(step), strict=False), 1):
        samples = [sample for rows in of_ranks for row in rows for sample in row]
        named = ", ".join(_where(run, sample) for sample in samples)
        yield _part(f"micro batch {number}: {named}", "", _take(loop, [batch], step, _never), units)


def _part(where: str, text: str, found: StepResult, units: float) -> Part:
    own = float(found.counts[1])
    return Part(where, text, own, float(found.loss), float(found.grad_norm) * own / max(1.0, units))


def _where(run: Run, number: int) -> str:
    """FILE:ROW of sample ``number``, the file as seen from the working folder; its number where that is not known."""
    place = place_of(run.dataset, number)
    return place.removeprefix(f"{Path.cwd()}/") if place else f"sample {number}"


def _text(run: Run, number: int) -> str:
    """The beginning of sample ``number``, as text."""
    shown = [part for part in run.task.parts(run.dataset[number]) if len(part.token_ids)]
    return " ".join(run.task.tokenizer.decode(part.token_ids[:TEXT]) for part in shown)[:TEXT]
