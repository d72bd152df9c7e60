"""Log records: the numbers of a step, and the speed of training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from panda.data.batches import Batch
from panda.engine.checkpoints.manifest import Progress
from panda.engine.memory_parts import GIB
from panda.engine.steps import Evaluated
from panda.engine.steps import StepResult
from panda.engine.steps import together
from panda.files.records import read_records
from panda.registry import UserError
from panda.run.asking import Added
from panda.run.cards import this_card
from panda.run.state import Run
from panda.weights.run_folders import METRICS

TAKEN = {
    *("step", "loss", "router_loss", "learning_rate", "grad_norm", "tokens", "skipped_steps", "left_out_steps"),
    *("tokens_per_second", "step_seconds", "data_wait", "memory_gib", "mfu", "seconds"),
    *("save_seconds", "resume_seconds"),
}
"""Names of entries that records have besides the metrics of a task, and the number of its units."""


class Clock:
    """Time and tokens since the last record."""

    def __init__(self, progress: Progress) -> None:
        self.last, self.time = progress, time.perf_counter()
        self.waited = 0.0

    def waiting_for(self, batches: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        """``batches``; measures the time that is spent waiting for each."""
        arriving = iter(batches)
        while True:
            begun = time.perf_counter()
            batch = next(arriving, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    def rates(self, progress: Progress) -> dict[str, float]:
        """The speed of training since the last call, as entries of a record."""
        now = time.perf_counter()
        seconds, waited = now - self.time, self.waited
        tokens, steps = progress.tokens - self.last.tokens, progress.step - self.last.step
        self.last, self.time, self.waited = progress, now, 0.0
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "step_seconds": round(seconds / steps, 6),
            "data_wait": round(waited / seconds, 6),
        }

    def leave_out(self, seconds: float) -> None:
        """Do not count ``seconds`` that were spent on something other than training."""
        self.time += seconds


@dataclass(frozen=True)
class Gpu:
    """What records say of the GPU that a rank trains on."""

    device: torch.device
    flops_per_token: float | None
    """Operations of forward and backward pass for a token; None where they are not known."""
    peak: float | None
    """Operations a second of the GPUs of all ranks, at most; None where that is not known."""

    @classmethod
    def of(cls, run: Run) -> Gpu | None:
        """That of ``run`` on this rank; None on a CPU."""
        device = run.processes.device
        if device.type != "cuda":
            return None
        card = this_card(device)
        peak = card.peak if run.options.precision != "fp32" else None
        return cls(device, run.flops_per_token, peak and peak * run.processes.world_size)

    def entries(self, tokens_per_second: float) -> dict[str, float]:
        """Entries of a record. Does not wait for the device."""
        found = {"memory_gib": round(torch.cuda.max_memory_allocated(self.device) / GIB, 2)}
        torch.cuda.reset_peak_memory_stats(self.device)
        if self.flops_per_token is not None and self.peak is not None:
            found["mfu"] = round(tokens_per_second * self.flops_per_token / self.peak, 4)
        return found


def log_record(
    result: StepResult,
    progress: Progress,
    learning_rate: float,
    clock: Clock,
    observations: dict[str, dict[str, float]],
    *,
    unit: str,
    gpu: Gpu | None = None,
) -> dict[str, Any]:
    """The record that ``panda_log`` is given, whose documentation explains the keys."""
    loss, grad_norm = float(result.loss), float(result.grad_norm)  # waits for the device
    rates = clock.rates(progress)
    record: dict[str, Any] = {
        "step": progress.step,
        "loss": loss,
        **({} if result.step_loss is None else {"router_loss": float(result.step_loss)}),
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "tokens": progress.tokens,
        unit: progress.units,
        "skipped_steps": progress.skipped_steps,
        **({"left_out_steps": progress.left_out_steps} if progress.left_out_steps else {}),
        **rates,
        **(gpu.entries(rates["tokens_per_second"]) if gpu else {}),
        **_summary(observations),
    }
    return record | _metrics(result.metrics, "", record)


def evaluation_record(step: int, found: Mapping[str, Evaluated], unit: str, begun: float) -> dict[str, Any]:
    """The record that ``panda_evaluation`` is given, of an evaluation that began at ``begun`` (``perf_counter``).

    ``found``: what was found of each set, by its name; that of the only one is empty.
    """
    record: dict[str, Any] = {"step": step}
    record |= _evaluated(together([*found.values()]), unit, "eval_", record)
    record["eval_seconds"] = round(time.perf_counter() - begun, 3)
    for name, each in found.items():
        if name:
            record |= _evaluated(each, unit, f"eval_{name}_", record)
    return record


def _evaluated(found: Evaluated, unit: str, prefix: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """What was ``found`` of a set, as further entries of ``record``. Waits for the device."""
    tokens, units = found.counts.tolist()
    entries = {f"{prefix}loss": float(found.loss), f"{prefix}tokens": int(tokens), f"{prefix}{unit}": as_number(units)}
    if taken := [name for name in entries if name in record]:
        raise UserError(
            f"eval_names: {prefix.removeprefix('eval_')[:-1]!r}: its `{taken[0]}` has the name of a metric of the task."
            " Name the set otherwise."
        )
    return entries | _metrics(found.metrics, prefix, {**record, **entries})


def is_recorded(directory: Path, record: Mapping[str, Any]) -> bool:
    """Whether the run in ``directory`` has recorded the evaluation in ``record``, whatever time it took."""
    return any(_without_times(record) == _without_times(each) for each in read_records(directory / METRICS))


def _without_times(record: Mapping[str, Any]) -> dict[str, Any]:
    """``record`` as a file gives it back: numbers that are not finite become null."""
    kept = {name: value for name, value in record.items() if "seconds" not in name and "per_second" not in name}
    return {name: None if isinstance(each, float) and not isfinite(each) else each for name, each in kept.items()}


def add_to(record: dict[str, Any], added: dict[str, Added], prefix: str = "") -> None:
    """Move what hooks have ``added`` to ``record``, its names after ``prefix``. Waits for the device.

    Raises UserError where a name is that of another entry of a record.
    """
    for name, each in added.items():
        if name in TAKEN or f"{prefix}{name}" in record:
            raise UserError(
                f"{each.by}: run.log({name!r}, ...) has the name of another entry of a record. Name it otherwise."
            )
        record[f"{prefix}{name}"] = each.value.item() if hasattr(each.value, "item") else each.value
    added.clear()


def as_number(units: float) -> int | float:
    """A number of units: a fraction only where they have weights."""
    return int(units) if units == int(units) else units


def refuse_unit(unit: str, whose: str = "") -> None:
    """Raise UserError where the ``unit`` of a task is called like another entry of a record, which it would replace.

    ``whose``: where the task is from.
    """
    if unit in TAKEN:
        of = f" of {whose}" if whose else ""
        raise UserError(f"task{of}: its unit is called {unit!r}, like another entry of a record. Name it otherwise.")


def refuse_metrics(names: Iterable[str], unit: str) -> None:
    """Raise UserError where a metric of a task, of ``names``, is called like another entry of a record."""
    if taken := sorted({*names} & {*TAKEN, unit}):
        raise UserError(f"task: a metric is called {taken[0]!r}, like another entry of a record. Name it otherwise.")


def refuse_entries(names: Iterable[str], sets: Iterable[str], unit: str) -> None:
    """Raise UserError where a score, of ``names``, is called like an entry that evaluations have anyway.

    ``sets``: the names of the evaluation sets.
    """
    entries = {f"{of}{each}" for of in ("", *(f"{name}_" for name in sets)) for each in ("loss", "tokens", unit)}
    if taken := sorted(name for name in names if name in TAKEN or name in entries):
        raise UserError(
            f"eval_metrics: a score is called {taken[0]!r}, like another entry of a record. Name it, or the set in"
            " eval_names, otherwise."
        )


def refuse_sets(names: Iterable[str], unit: str) -> None:
    """Raise UserError where an entry of a set of one of ``names`` would be called like one of all sets."""
    of_all = ("loss", "tokens", unit, "seconds")
    for name in names:
        if taken := [each for each in of_all for of_set in ("loss", "tokens", unit) if f"{name}_{of_set}" == each]:
            raise UserError(f"eval_names: {name!r}: `eval_{taken[0]}` is an entry of all sets. Name it otherwise.")


def _metrics(found: Mapping[str, torch.Tensor], prefix: str, record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a task as further entries of ``record``. Raises UserError where one has the name of another."""
    if taken := sorted(name for name in found if name in TAKEN or f"{prefix}{name}" in record):
        raise UserError(f"task: a metric is called {taken[0]!r}, like another entry of a record. Name it otherwise.")
    if not found:
        return {}
    values = torch.stack([value.double() for value in found.values()]).tolist()
    return {f"{prefix}{name}": value for name, value in zip(found, values, strict=True)}


def _summary(observations: dict[str, dict[str, float]]) -> dict[str, float]:
    """Minimum, median and maximum of each quantity, as entries of a record."""
    parts: dict[str, Callable[[Any], Any]] = {"min": min, "median": statistics.median, "max": max}
    return {
        f"{quantity}_{part}": take(values.values())
        for quantity, values in observations.items()
        for part, take in parts.items()
    }
