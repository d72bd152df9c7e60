"""The ``guard`` plugin: what becomes of steps whose loss or gradients are not finite, or far above those before."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import fields
from math import isfinite
from statistics import median
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

from panda.configuration.user_code import flags_of_files
from panda.files.terminal import printable
from panda.files.whole import whole
from panda.hooks.record_file import RecordFile
from panda.hooks.record_file import read_records
from panda.registry import Meta
from panda.registry import UserError
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from panda.data.batches import Batch
    from panda.runner import Run

FILE_NAME = "skipped.jsonl"
BATCHES = "skipped-batches"
"""The folder of the batches at which a run was stopped."""
OWN = "plugin guard: "
"""Before the reasons of this plugin where a run names who skips a step."""
SHOWN = 3
"""Samples and steps that a line names."""
WINDOW = 100
"""Steps whose losses and norms say what is usual: the last that were taken."""
FEWEST = 20
"""With fewer of them, none is judged."""
TO_DEVIATION = 1.4826
"""Times the median of the distances from the median: the standard deviation, of a normal distribution."""
LEAST_DEVIATION = 0.01
"""Of the median: where all steps are alike, smaller differences are none."""


def read_skipped(run: Path) -> dict[int, dict[str, Any]]:
    """The records of the skipped steps of ``run``, a run directory, by step."""
    return {record["step"]: record for record in read_records(run / FILE_NAME)}


def batches_of(run: Path, step: int) -> list[Path]:
    """The files of the batches of ``step``, at which ``run`` ended since it had skipped too many steps; else none."""
    return sorted((run / BATCHES).glob(f"step-{step:08d}-rank-*.safetensors"))


@dataclass(frozen=True)
class GuardOptions:
    """Options of the guard plugin."""

    guard_spike: Annotated[float, Meta(gt=0)] | None = None
    """Also skip a step whose loss or gradient norm is so many robust standard deviations above the median of the last
    100 steps: 10, say. The host then waits for the device once more in each step. By default only steps whose loss or
    gradients are not finite are skipped."""
    guard_patience: Annotated[int, Meta(ge=1)] = 50
    """Skipped steps in a row that end the run with an error."""


@register_plugin("guard", options=GuardOptions)
def guard(options: GuardOptions, context: PluginContext) -> Guard:
    """Writes down the rows of skipped steps, and ends a run that only skips. Every run has it; `-p no:guard` not."""
    return Guard(options) if options.guard_spike is None else SpikeGuard(options, options.guard_spike)


class Guard:
    """Reports steps that were skipped since their loss or gradients were not finite: the engine skips them."""

    acts = False  # it only watches: no step waits for it

    def __init__(self, options: GuardOptions) -> None:
        self.options = options
        self.file: RecordFile | None = None
        self.batches: list[Batch] = []

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        run.most_skipped = self.options.guard_patience
        path = run.directory / FILE_NAME
        if run.processes.rank == 0 and path.exists():
            RecordFile(path, run.step).close()  # without the steps that this run takes again

    @hookimpl
    def panda_step_start(self, batches: list[Batch]) -> None:
        self.batches = batches

    @hookimpl
    def panda_step_end(self, run: Run, step: int) -> None:
        if run.loss is None or run.grad_norm is None:  # left out
            return
        if run.applied:
            self._taken()
            return
        loss, grad_norm = float(run.loss), float(run.grad_norm)  # waits for the device, as a step that was skipped may
        searches = run.options.precision == "fp16" and isfinite(loss) and run.left_out is None
        why = run.left_out.removeprefix(OWN) if run.left_out else _why_not_finite(loss, searches=searches)
        samples = list(samples_of(run, step))
        if run.processes.rank == 0:
            self._write(run, step, why, (loss, grad_norm), samples)
            if not searches or run.skipped_in_a_row == 1:
                print(printable(f"step {step} is skipped: {why}. {_named(run, step, samples)}"), flush=True)
        if run.skipped_in_a_row >= run.most_skipped:
            run.processes.together(lambda: _save(run, step, self.batches))

    def _taken(self) -> None:
        """The step that has just ended was taken."""

    @hookimpl
    def panda_run_end(self, run: Run) -> None:
        self._sum_up(run)

    @hookimpl(tryfirst=True)
    def panda_exception(self, run: Run) -> None:
        self._sum_up(run)

    def _write(self, run: Run, step: int, why: str, found: tuple[float, float], samples: list[dict[str, Any]]) -> None:
        rate = run.options.learning_rate * run.schedule(step - 1) * run.learning_rate_factor
        samples = [each | {"row": each["row"] and os.path.abspath(each["row"])} for each in samples]
        record = {"step": step, "why": why, "loss": found[0], "grad_norm": found[1], "learning_rate": rate}
        if self.file is None:
            self.file = RecordFile(run.directory / FILE_NAME, step - 1)
        self.file.write({**record, "samples": samples})

    def _sum_up(self, run: Run) -> None:
        """Close the file, and print on rank 0 how many steps were skipped."""
        if self.file is not None:
            self.file.close()
            self.file = None
        path = run.directory / FILE_NAME
        if run.processes.rank != 0 or not path.exists():
            return
        steps = [record["step"] for record in read_records(path)]
        if steps:
            shown = ", ".join(f"{step:,}" for step in steps[:SHOWN]) + ", ..." * (len(steps) > SHOWN)
            were = "was" if len(steps) == 1 else "were"
            print(printable(f"{len(steps):,} of {run.step:,} steps {were} skipped: {shown} ({path})"), flush=True)


class SpikeGuard(Guard):
    """Also has steps skipped whose loss or gradient norm is far above those of the steps before."""

    acts = True

    def __init__(self, options: GuardOptions, limit: float) -> None:
        super().__init__(options)
        self.limit = limit
        self.usual = {name: deque[float](maxlen=WINDOW) for name in ("loss", "gradient norm")}
        self.found: dict[str, float] = {}
        """Those of the step that is under way."""

    @hookimpl
    def panda_gradients(self, run: Run, loss: torch.Tensor, grad_norm: torch.Tensor | float) -> None:
        self.found = {"loss": float(loss), "gradient norm": float(grad_norm)}
        above = [spike(name, value, self.usual[name], self.limit) for name, value in self.found.items()]
        if why := " and ".join(each for each in above if each):
            run.skip_step(f"{why} (guard_spike: {self.limit:g})")

    def _taken(self) -> None:
        for name, value in self.found.items():
            self.usual[name].append(value)

    @hookimpl
    def panda_save_state(self, run: Run) -> dict[str, Any]:
        return {"usual": {name: list(values) for name, values in self.usual.items()}}

    @hookimpl
    def panda_load_state(self, run: Run, state: dict[str, Any]) -> None:
        for name, values in state["usual"].items():
            self.usual[name].extend(values)


def spike(name: str, value: float, usual: Iterable[float], limit: float) -> str | None:
    """How far the ``name`` of a step, ``value``, is above the ``usual`` ones, if that is more than ``limit`` robust
    deviations; else None."""
    before = list(usual)
    if len(before) < FEWEST:
        return None
    middle = median(before)
    spread = median(abs(each - middle) for each in before)
    deviation = max(TO_DEVIATION * spread, LEAST_DEVIATION * abs(middle), 1e-12)
    above = (value - middle) / deviation
    if above <= limit:
        return None
    return f"its {name} of {value:.4g} is {above:,.0f} deviations above the median of {middle:.4g}"


def samples_of(run: Run, step: int) -> Iterator[dict[str, Any]]:
    """The samples of ``step`` on all data-parallel ranks: of each its number, its row, and who had it."""
    from panda.data.places import place_of

    for micro_batch, of_ranks in enumerate(run.layout.micro_batches(step)):
        for rank, rows in enumerate(of_ranks):
            for sample in (number for row in rows for number in row):
                place = place_of(run.dataset, sample)
                yield {"rank": rank, "micro_batch": micro_batch, "sample": sample, "row": place}


def _why_not_finite(loss: float, *, searches: bool) -> str:
    if searches:
        return "its gradients overflow in fp16, and the loss scale is lowered"
    return "its gradients are not finite" if isfinite(loss) else f"its loss is {_spelt(loss)}"


def _spelt(value: float) -> str:
    return "NaN" if value != value else "infinite"


def _named(run: Run, step: int, samples: list[dict[str, Any]]) -> str:
    """The first of ``samples``, and where the others are."""
    first = ", ".join(each["row"] or f"sample {each['sample']}" for each in samples[:SHOWN])
    more = f" and {len(samples) - SHOWN:,} more" if len(samples) > SHOWN else ""
    replay = f"panda replay {run.directory} {step}{flags_of_files(run.resolved)}"
    return f"Its rows: {first}{more} ({FILE_NAME}). To find those responsible: {replay}"


def _save(run: Run, step: int, batches: list[Batch]) -> None:
    """Write this rank's ``batches``, the tensors of all micro batches of ``step``."""
    from safetensors.torch import save_file

    folder = run.directory / BATCHES
    path = folder / f"step-{step:08d}-rank-{run.processes.rank}.safetensors"
    try:
        folder.mkdir(exist_ok=True)
        with whole(path) as new:
            save_file(dict(_tensors(batches)), new)
    except OSError as problem:
        raise UserError(f"{path}: the batch cannot be saved: {problem.strerror}") from None


def _tensors(batches: list[Batch]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of ``batches``, by the number of the batch and their name."""
    import torch

    for number, batch in enumerate(batches):
        own = {each.name: getattr(batch, each.name) for each in fields(batch)}
        for name, value in {**own, **batch.arrays}.items():
            if isinstance(value, torch.Tensor):
                yield f"{number}.{name}", value.detach().clone().contiguous()
