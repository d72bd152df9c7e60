"""Marks on the time of a training process, in a file: steps, their parts, memory. On a GPU they are events on its
stream, which are read once the device has passed them, so that marking waits for nothing.

A file has a JSON object a line. ``start``: the process can mark. ``step``: the number, ``at`` (the host's clock,
seconds since 1970, when the step was submitted), ``seconds`` since the end of the step before (null for the first),
``parts`` (seconds of forward, backward and optimizer; data, if it was marked, is the host's time), and the counts of
its batches. ``first`` and ``last``: the device has finished the first and the last step, at ``at``. ``last`` and
``end`` have the peak of memory so far, in bytes.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENVIRONMENT = "PANDA_BENCH_MARKS"
"""Names the folder of the files."""


class Marks:
    """The marks of one process."""

    def __init__(self, folder: Path, rank: int, *, on_gpu: bool, counts: bool = True) -> None:
        """``counts``: whether the tokens of this rank are its own; of tensor-parallel ranks only one says so."""
        self.stream = (folder / f"rank-{rank}.jsonl").open("w", encoding="utf-8")
        self.on_gpu = on_gpu
        self.counts: dict[str, int] = {}
        self.spans: list[tuple[str, Any, Any]] = []
        self.before: Any = None
        self.forward: Any = None
        self.pending: list[tuple[dict[str, Any], Any, list[tuple[str, Any, Any]], Any]] = []
        self.write("start", counts=counts)

    def write(self, event: str, **values: Any) -> None:
        self.stream.write(json.dumps({"event": event, "at": time.time(), **values}) + "\n")
        self.stream.flush()

    def point(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def span(self, part: str, begin: Any, end: Any) -> None:
        self.spans.append((part, begin, end))

    def wrap(self, owner: Any, attribute: str, part: str, *, on_host: bool = False) -> None:
        """Count calls of ``owner.attribute`` as ``part``; of backward also what came before, since the forward pass
        began. ``on_host``: the time of the call on the host."""
        wrapped: Callable[..., Any] = getattr(owner, attribute)

        @functools.wraps(wrapped)
        def marked(*arguments: Any, **keywords: Any) -> Any:
            begin = time.perf_counter() if on_host else self.point()
            if part == "backward" and self.forward is not None:
                self.span("forward", self.forward, begin)
                self.forward = None
            try:
                return wrapped(*arguments, **keywords)
            finally:
                self.span(part, begin, time.perf_counter() if on_host else self.point())

        setattr(owner, attribute, marked)

    def begin_forward_with(self, module: Any) -> None:
        """The forward pass of a micro batch begins when ``module`` is called."""

        def begin(*_: Any) -> None:
            self.forward = self.point()

        module.register_forward_pre_hook(begin)

    def count(self, **counts: int) -> None:
        for name, value in counts.items():
            self.counts[name] = self.counts.get(name, 0) + value

    def step_end(self, step: int, *, last: bool, **more: Any) -> None:
        """Optimizer step ``step`` has been submitted. Waits for the device after the first and the last one."""
        end = self.point()
        record = {"step": step, "submitted": time.time(), **self.counts, **more}
        self.pending.append((record, self.before, self.spans, end))
        self.before, self.spans, self.counts = end, [], {}
        if last or step == 1:
            self._wait()
        self._write_passed()
        if step == 1:
            self.write("first")
        if last:
            self.write("last", **self.memory())

    def end(self, event: str = "end") -> None:
        """The process ends: the memory of everything."""
        self.write(event, **self.memory())

    def memory(self) -> dict[str, int]:
        if not self.on_gpu:
            return {}
        import torch

        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}

    def _wait(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()

    def _write_passed(self) -> None:
        """Write the steps that the device has finished."""
        while self.pending:
            record, before, spans, end = self.pending[0]
            if self.on_gpu and not end.query():
                return
            del self.pending[0]
            parts: dict[str, float] = {}
            for part, begin, until in spans:
                parts[part] = parts.get(part, 0.0) + _seconds(begin, until)
            self.write("step", **record, seconds=None if before is None else _seconds(before, end), parts=parts)


def _seconds(begin: Any, end: Any) -> float:
    return float(end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000)
