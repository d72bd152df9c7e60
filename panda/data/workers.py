"""The processes that prepare batches, as the training process sees them: which was killed, and where each stands."""

from __future__ import annotations

import faulthandler
import mmap
import os
import re
import signal
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from typing import Any

import numpy as np

from panda.registry import UserError

TRACE_SIGNAL = signal.SIGUSR1
"""In a worker, writes where its main thread is: also in code that never returns to Python."""
TRACE_SECONDS = 1.0
_STDLIB = sysconfig.get_path("stdlib")

_all: list[Workers] = []
"""Of loaders that give batches now, the workers."""


def workers_standing() -> str:
    """Where the processes stand that prepare batches now, as text; empty where there are none."""
    return "; ".join(text for workers in _all for text in workers.standing())


class Workers:
    """The workers of one loader."""

    def __init__(self, number: int, parent: int | None = None) -> None:
        """Before they are forked. ``parent``: the training process, by default this one."""
        self.number = number
        self.parent = os.getpid() if parent is None else parent
        """Known before the fork: it may end before a worker first looks who its parent is."""
        self._memory = mmap.mmap(-1, max(1, number) * 16)
        self._notes = np.frombuffer(self._memory, dtype=np.int64).reshape(-1, 2)
        """Of each worker, whether it can be asked where it is, and one more than the sample that it reads."""
        self._traces = [os.fdopen(os.memfd_create(f"worker-{worker}"), "rb+", 0) for worker in range(number)]
        self._worker: int | None = None
        self._loader: Any = None
        self._waits = False

    # -- in a worker

    def begin(self, worker: int) -> None:
        """Called by ``worker`` when it has begun."""
        if worker >= self.number:
            return
        self._worker = worker
        faulthandler.register(TRACE_SIGNAL, self._traces[worker], all_threads=False)
        self._notes[worker, 0] = 1

    def reads(self, sample: int) -> None:
        """Called by a worker before it reads the sample of this number."""
        if self._worker is not None:
            self._notes[self._worker, 1] = sample + 1

    def __reduce__(self) -> tuple[Any, ...]:
        return Workers, (0, self.parent)  # where processes are not forked, no memory is shared

    # -- in the training process

    @contextmanager
    def watched(self, batches: Any) -> Iterator[None]:
        """Notice in the meantime when a worker of ``batches``, a loader's iterator, is killed."""
        self._loader = batches
        _all.append(self)
        # torch (2.13) raises wherever the main thread is when it hears that a worker was killed: in the middle of a
        # step, or of a plugin. Here that is raised only where batches are waited for. Can go when torch does so.
        if getattr(batches, "_worker_pids_set", False):
            from torch.utils.data._utils.signal_handling import _remove_worker_pids  # type: ignore[attr-defined]

            _remove_worker_pids(id(batches))
            batches._worker_pids_set = False
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD)

        def ended(number: int, frame: Any) -> None:
            if callable(before):
                before(number, frame)
            self.check()

        if is_main and self.processes:
            signal.signal(signal.SIGCHLD, ended)
        try:
            yield
        finally:
            self._waits = False
            if is_main and self.processes:
                signal.signal(signal.SIGCHLD, before)
            _all.remove(self)
            if self.killed():
                self._forget()
            for trace in self._traces:
                trace.close()

    @property
    def processes(self) -> list[Any]:
        return getattr(self._loader, "_workers", [])

    def killed(self) -> list[Any]:
        """The workers that have ended by a signal, or in another way that they should not."""
        return [process for process in self.processes if process.exitcode not in (None, 0)]

    def check(self) -> None:
        """Raise WorkerKilledError if one was killed, and batches are waited for."""
        if self._waits and self.killed():
            raise WorkerKilledError

    @contextmanager
    def waited_for(self) -> Iterator[None]:
        """While this is open, a worker that is killed raises UserError here.

        Also where this process reads what that worker had half written, and would wait for the rest for ever.
        """
        try:
            self._waits = True
            self.check()
            yield
            self._waits = False
        except RuntimeError as problem:
            self._waits = False
            if not isinstance(problem, WorkerKilledError) and "exited unexpectedly" not in str(problem):
                raise
            raise UserError(self._what_happened()) from problem
        finally:
            self._waits = False

    def _what_happened(self) -> str:
        until = time.monotonic() + TRACE_SECONDS
        while not (killed := self.killed()) and time.monotonic() < until:
            time.sleep(0.01)
        by = {process.pid: _name(process.exitcode) for process in killed}
        processes = ", ".join(f"process {pid}, {how}" for pid, how in by.items()) or "it is gone"
        return (
            f"num_workers: a process that prepares batches was killed from outside ({processes}), most likely since"
            " memory ran out. Lower num_workers or prefetch_factor."
        )

    def _forget(self) -> None:
        """End the other workers, and the loader: it would wait for what the killed one holds."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(TRACE_SECONDS)
        self._loader._shutdown = True

    def standing(self) -> Iterator[str]:
        """Where each worker stands."""
        for worker, process in enumerate(self.processes):
            if process.exitcode is None:
                yield f"worker process {process.pid} {self._standing(worker, process.pid)}"

    def _standing(self, worker: int, pid: int) -> str:
        sample = int(self._notes[worker, 1]) - 1 if worker < self.number else -1
        parts = [f"reads sample {sample:,}" if sample >= 0 else "has read no sample"]
        if worker < self.number and self._notes[worker, 0]:
            parts += [f"at {frame}" for frame in self._frame(worker, pid)]
        if files := _opened_by(pid):
            parts.append(f"with {', '.join(files)} open")
        return " ".join(parts)

    def _frame(self, worker: int, pid: int) -> list[str]:
        """The innermost frame of a worker's main thread that is not of a library; nothing if it does not answer."""
        trace = self._traces[worker].fileno()
        before = os.fstat(trace).st_size
        with suppress(OSError):
            os.kill(pid, TRACE_SIGNAL)
        until = time.monotonic() + TRACE_SECONDS
        text = ""
        while time.monotonic() < until and not text.endswith("\n"):
            time.sleep(0.02)
            text = os.pread(trace, 100_000, before).decode(errors="replace")
        frames = re.findall(r'File "(.*)", line (\d+) in (\S+)', text)
        own = next((frame for frame in frames if not _is_of_library(frame[0])), frames[0] if frames else None)
        return [f"{own[0]}:{own[1]} ({own[2]})"] if own else []


def _is_of_library(file: str) -> bool:
    return "-packages/torch/" in file or (file.startswith((_STDLIB, "<")) and "-packages" not in file)


class WorkerKilledError(RuntimeError):
    """A process that prepares batches was killed."""


def _name(exitcode: int) -> str:
    return signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"


def _opened_by(pid: int) -> list[str]:
    """The files that a worker has opened, and this process has not."""

    def links(process: str) -> set[str]:
        found = set()
        with suppress(OSError):
            for descriptor in os.listdir(f"/proc/{process}/fd"):
                with suppress(OSError):
                    found.add(os.readlink(f"/proc/{process}/fd/{descriptor}"))
        return found

    files = links(str(pid)) - links("self")
    return sorted(
        file for file in files if file.startswith("/") and not file.startswith(("/dev/", "/memfd:", "/proc/"))
    )
