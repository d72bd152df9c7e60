"""The ``profile`` plugin: where the time of a step goes, as a table and a trace. The flag ``--profile`` adds it."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

from panda.files.terminal import number_of
from panda.files.whole import write_whole
from panda.registry import Meta
from panda.registry import hookimpl
from panda.registry import register_plugin
from panda.registry.contexts import PluginContext

if TYPE_CHECKING:
    import torch

    from panda.runner import Run

FOLDER = "profile"
OPERATIONS = 15
"""Operations that the table names, the longest first."""


@dataclass(frozen=True)
class ProfileOptions:
    """Options of the profile plugin."""

    profile_after: Annotated[int, Meta(ge=1)] = 3
    """Steps before the first that is profiled: code is compiled, and memory allocated, in the first ones."""
    profile_steps: Annotated[int, Meta(ge=1)] = 3
    """Steps that are profiled."""


@register_plugin("profile", options=ProfileOptions)
class Profile:
    """Writes `profile/`: a table of the parts of a step, and a trace for https://ui.perfetto.dev. On rank 0."""

    acts = False  # it only watches

    def __init__(self, options: ProfileOptions, context: PluginContext) -> None:
        self.options = options
        self.profiler: torch.profiler.profile | None = None
        self.marks: list[tuple[str, Any]] = []
        self.kernels: list[Kernel] = []
        self.on_gpu = False
        self.last_step = 0

    @hookimpl
    def panda_run_start(self, run: Run) -> None:
        self.last_step = run.step + self.options.profile_after + self.options.profile_steps
        if run.processes.rank == 0 and run.plan.total_steps < self.last_step:
            print(f"note: --profile needs {self.last_step - run.step} steps: this run is too short for it", flush=True)

    @hookimpl
    def panda_step_end(self, run: Run, step: int) -> None:
        if run.processes.rank != 0:
            return
        if step == self.last_step - self.options.profile_steps and self.last_step <= run.plan.total_steps:
            self._begin(run)
        elif step == self.last_step and self.profiler is not None:
            self._end(run)

    @hookimpl
    def panda_exception(self, run: Run) -> None:
        if self.profiler is not None:
            self.profiler.stop()

    def _begin(self, run: Run) -> None:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile

        self.on_gpu = run.processes.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_gpu
        self.profiler = profile(activities=activities)
        self.profiler.start()
        run.engine.on_part = self._mark
        self._mark("between steps")

    def _mark(self, part: str) -> None:
        """Part ``part`` of a step begins now, on the device if it is a GPU: the host is ahead of it."""
        import torch

        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.marks.append((part, event))
        else:
            self.marks.append((part, time.perf_counter()))

    def _end(self, run: Run) -> None:
        assert self.profiler is not None
        self._mark("end")
        run.engine.on_part = None
        self.profiler.stop()
        folder = run.directory / FOLDER
        folder.mkdir(exist_ok=True)
        print(f"writing what was profiled of {number_of(self.options.profile_steps, 'step')} ...", flush=True)
        trace, table = folder / f"trace-step{run.step}.json.gz", folder / f"parts-step{run.step}.txt"
        self.profiler.export_chrome_trace(str(trace))
        self.kernels = kernels_of(self.profiler) if self.on_gpu else []
        text = "\n".join([*self._parts(), "", *self._operations()]) + "\n"
        write_whole(table, text)
        print(f"{text}{table}\n{trace} (open it at https://ui.perfetto.dev)", flush=True)
        self.profiler = None

    def _parts(self) -> list[str]:
        """Milliseconds a step of each part, with its share."""
        seconds: dict[str, float] = defaultdict(float)
        for (part, begun), (_, ended) in zip(self.marks[:-1], self.marks[1:], strict=True):
            seconds[part] += begun.elapsed_time(ended) / 1000 if self.on_gpu else ended - begun
        total, steps = sum(seconds.values()), self.options.profile_steps
        lines = [f"{'part of a step':24}{'ms':>10}{'share':>8}"]
        for part, taken in [*seconds.items(), ("whole step", total)]:
            lines.append(f"{part:24}{taken * 1000 / steps:10.2f}{taken / total:8.1%}")
        if self.on_gpu:
            lines += ["", f"{'the GPU':24}{'ms':>10}{'share':>8}"]
            for what, taken in device_time(self.kernels, total):
                lines.append(f"{what:24}{taken * 1000 / steps:10.2f}{taken / total:8.1%}")
        return lines

    def _operations(self) -> list[str]:
        """The operations that take longest: kernels of the GPU, or torch's operations on the CPU."""
        assert self.profiler is not None
        found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        if self.on_gpu:
            for kernel in self.kernels:
                found[kernel.name][0] += kernel.ended - kernel.began
                found[kernel.name][1] += 1
        else:
            for event in self.profiler.key_averages():
                if event.self_cpu_time_total:
                    found[event.key][0] += event.self_cpu_time_total / 1e6
                    found[event.key][1] += event.count
        total, steps = sum(taken for taken, _ in found.values()) or 1.0, self.options.profile_steps
        what = "kernel" if self.on_gpu else "operation"
        lines = [f"{'ms a step':>10}{'share':>8}{'calls':>8}  {what}"]
        longest = sorted(found.items(), key=lambda item: -item[1][0])[:OPERATIONS]
        for name, (taken, count) in longest:
            lines.append(f"{taken * 1000 / steps:10.2f}{taken / total:8.1%}{count / steps:8.0f}  {name[:90]}")
        lines.append(f"{total * 1000 / steps:10.2f}{1:8.1%}{'':8}  all {what}s")
        return lines


@dataclass(frozen=True)
class Kernel:
    """What ran on the GPU, in seconds of its clock."""

    name: str
    began: float
    ended: float


def kernels_of(profiler: torch.profiler.profile) -> list[Kernel]:
    """The kernels and copies of what was profiled, without the ranges that some libraries mark around theirs.

    Read as the profiler has them: torch's own tables match them with what launched them first, which took 90 s of three
    steps of a 1.3B (torch 2.11).
    """
    from torch._C._autograd import DeviceType  # torch.autograd has it, without exporting it

    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    return [
        Kernel(event.name(), event.start_ns() / 1e9, (event.start_ns() + event.duration_ns()) / 1e9)
        for event in results.events()
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation()
    ]


def device_time(kernels: list[Kernel], whole: float) -> list[tuple[str, float]]:
    """Of ``whole`` seconds, those in which the GPU computed, only exchanged data with other ranks, and did nothing."""
    changes = sorted(
        (moment, change, kernel.name.startswith("nccl"))
        for kernel in kernels
        for moment, change in ((kernel.began, 1), (kernel.ended, -1))
    )
    running = {True: 0, False: 0}
    computing = exchanging = last = 0.0
    for moment, change, exchanges in changes:
        if running[False]:
            computing += moment - last
        elif running[True]:
            exchanging += moment - last
        running[exchanges] += change
        last = moment
    idle = max(0.0, whole - computing - exchanging)
    return [("computes", computing), ("only exchanges", exchanging), ("is idle", idle)]
