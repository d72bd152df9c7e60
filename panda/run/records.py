"""Log records: the numbers of a step, and how fast steps come."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import TYPE_CHECKING
from typing import Any

from panda.data.batches import Batch
from panda.engine.checkpoints.folders import Progress
from panda.engine.engine import StepResult

if TYPE_CHECKING:
    import torch


class Clock:
    """Time and tokens since the last record."""

    def __init__(self, progress: Progress) -> None:
        self.last, self.time = progress, time.perf_counter()
        self.waited = 0.0

    def waiting_for(self, batches: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        """``batches``, with the time measured that each takes to come."""
        arriving = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(arriving, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def rates(self, progress: Progress) -> dict[str, float]:
        """What a record says of speed, since the last call."""
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
        """Do not count ``seconds`` that went into something else."""
        self.time += seconds


def log_record(
    result: StepResult,
    progress: Progress,
    learning_rate: float,
    clock: Clock,
    observations: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """What ``panda_log`` is given; its documentation says what the keys are."""
    loss, grad_norm = float(result.loss), float(result.grad_norm)  # waits for the device
    return {
        "step": progress.step,
        "loss": loss,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised_tokens,
        "skipped_steps": progress.skipped_steps,
        **clock.rates(progress),
        **_summary(observations),
    }


def evaluation_record(step: int, loss: torch.Tensor, counts: torch.Tensor, begun: float) -> dict[str, Any]:
    """What ``panda_evaluation`` is given, of an evaluation that began at ``begun``."""
    tokens, supervised = counts.tolist()  # waits for the device
    return {
        "step": step,
        "eval_loss": float(loss),
        "eval_tokens": int(tokens),
        "eval_supervised_tokens": int(supervised),
        "eval_seconds": round(time.perf_counter() - begun, 3),
    }


def _summary(observations: dict[str, dict[str, float]]) -> dict[str, float]:
    """Least, middle and largest of each quantity, for the record."""
    parts: dict[str, Callable[[Any], Any]] = {"min": min, "median": statistics.median, "max": max}
    return {
        f"{quantity}_{part}": take(values.values())
        for quantity, values in observations.items()
        for part, take in parts.items()
    }
