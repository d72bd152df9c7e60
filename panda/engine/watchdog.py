"""A thread that watches whether the ranks of a run go on, and says who keeps the others waiting.

Every rank reports where it stands to the store at which the ranks met. Rank 0 reads all reports; rank 1 does where
rank 0 does not answer. The first rank that fails says so there, and the others end with one line each.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from typing import Any

from panda.configuration.launcher import AnotherRankError
from panda.configuration.launcher import LostRankError
from panda.configuration.launcher import tell_launcher
from panda.engine.meeting import minutes
from panda.engine.meeting import spoken
from panda.engine.reports import Failure
from panda.engine.reports import Reports
from panda.engine.standing import BUSY_SHARE
from panda.engine.standing import Report
from panda.engine.standing import Standing
from panda.engine.standing import is_gone
from panda.engine.standing import is_stopped
from panda.engine.standing import this_host
from panda.engine.standing import used_by
from panda.engine.verdict import Seen
from panda.engine.verdict import Verdict
from panda.engine.verdict import verdict
from panda.files.private import without_secrets
from panda.files.terminal import printable_line
from panda.registry import UserError
from panda.registry.errors import in_brief

STALL, BUSY, BEAT = 30.0, 300.0, 2.0
"""Seconds: after which a rank that does nothing is late, one that works is named, and between two reports."""
GRACE = 1.0
"""Seconds in which the main thread notices that another rank has failed, before its process is ended."""
NEWS = 4.0
"""Seconds to find out what has become of the rank to which a connection was lost."""
FAILED, ERROR = 1, 2
"""Exit codes: another rank has failed; an error, which is printed."""


_current: Watchdog | None = None


def trouble() -> str | None:
    """Why no step of this run can be expected to end; None where all is well."""
    return None if _current is None else _current.trouble


def is_ending() -> bool:
    """Whether a rank has failed, so that this process ends by itself within seconds."""
    return _current is not None and _current.failure is not None


def ask_for_batches(where: Callable[[], str]) -> None:
    """``where()`` says where the processes stand that prepare batches. A thread calls it, when one is late."""
    if _current is not None:
        _current.where_batches_are = where


@contextmanager
def watching(rank: int, world_size: int, timeout: float, store: Any = None) -> Iterator[Watchdog]:
    """Watch this rank in the meantime, and the others by ``store``, a connection that nobody else uses.

    An exception whose cause is another rank becomes ``AnotherRankError``, or a LostRankError that names that rank.
    """
    global _current
    outer, watchdog = _current, Watchdog(rank, world_size, timeout, store)
    _current = watchdog
    watchdog.start()
    try:
        yield watchdog
    except BaseException as error:
        if (instead := watchdog.conclude(error)) is not None:
            raise instead from error
        raise
    finally:
        watchdog.stop()
        _current = outer


class Watchdog:
    """Watches this rank and, by a store, the others."""

    def __init__(self, rank: int, world_size: int, timeout: float, store: Any = None) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.stall = min(STALL, timeout / 4)
        self.busy = max(min(BUSY, timeout / 2), 2 * self.stall)
        self.beat = min(BEAT, self.stall / 4)
        self.trouble: str | None = None
        self.failure: Failure | None = None
        self.where_batches_are: Callable[[], str] = lambda: ""
        self._standing, self._host = Standing(), this_host()
        self._report: Report | None = None
        self._verdict: Verdict | None = None
        self._since = 0.0
        self._used: dict[int, tuple[float, float]] = {}
        """Of ranks that do not report, the seconds of processor when they last were seen to use it, and when."""
        self._concludes = False
        self._ending = threading.Lock()
        """Held by the thread that ends this process."""
        self._gone: dict[int, float] = {}
        """Of ranks that have ended, since when that is known."""
        self._ended, self._hurry, self._wakes = threading.Event(), threading.Event(), threading.Event()
        self._reports = Reports(store, rank, world_size) if store is not None else None
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if self._reports is not None:
            self._threads.append(threading.Thread(target=self._exchange, name="reports", daemon=True))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads; a rank that ends as it should says so."""
        self._ended.set()
        self._hurry.set()
        self._wakes.set()
        for thread in self._threads:
            thread.join(2 * BEAT)  # not longer: it may wait for a store that is gone

    def prepares(self, rank: int) -> bool:
        """Whether ``rank`` is known to be at work: it has reported within the last seconds."""
        seen = self._reports.seen.get(rank) if self._reports is not None else None
        return seen is not None and time.monotonic() - seen[1] < self.stall

    # -- threads

    def _watch(self) -> None:
        while True:
            self._wakes.wait(self.beat)
            self._wakes.clear()
            if self._ended.is_set():
                return
            look = self._standing.look()._asdict()
            is_late = look.pop("for_data") and look["idle"] >= self.stall
            before = self._report
            data = ((before.data if before else "") or self.where_batches_are()) if is_late else ""
            beat = before.beat + 1 if before else 0
            self._report = Report(self.rank, **look, data=data, host=self._host, pid=os.getpid(), beat=beat)
            if self.failure is not None and not self._concludes:
                self._end()  # of the process, unless the main thread is about to
            self._judge()

    def _exchange(self) -> None:
        """Bring the report of this rank to the others, and what they say here. Alone uses the connection."""
        reports = self._reports
        assert reports is not None
        while True:
            self._hurry.wait(0.1 if self._concludes or self.failure is not None else self.beat)
            self._hurry.clear()
            is_last = self._ended.is_set()
            begun = time.monotonic()
            with suppress(RuntimeError):  # the store is gone, with rank 0 or the launcher
                reports.exchange(self._report, is_done=is_last and self.failure is None)
                self.failure = self.failure or reports.failure()
                if self.failure is not None:
                    self._wakes.set()
                    reports.count()
                reports.answered = begun
                if self._speaks():
                    reports.tell_trouble(self.trouble)
                elif self.failure is None:
                    self.trouble = reports.trouble()
            if is_last:
                return

    # -- what is said

    def _seen(self) -> dict[int, Seen]:
        """Of each rank that this one reads, the last report."""
        now, seen = time.monotonic(), {}
        for rank, (report, when) in (self._reports.seen.copy() if self._reports is not None else {}).items():
            silent, state = now - when, ""
            if report.host == self._host and not report.done:
                state = self._state(report, silent)
            seen[rank] = Seen(report, silent, state)  # type: ignore[arg-type]
        if self._report is not None:
            seen[self.rank] = Seen(self._report, 0.0)
        return seen

    def _state(self, report: Report, silent: float) -> str:
        """What the system says of the process of a rank on this machine that has not reported."""
        assert self._reports is not None
        if is_gone(report.pid):  # and perhaps has said at last that it is done
            return "gone" if self._reports.answered > self._gone.setdefault(report.rank, time.monotonic()) else ""
        now, used = time.monotonic(), used_by(report.pid)
        before, when = self._used.setdefault(report.rank, (used, now))
        if used - before > BUSY_SHARE * (now - when):
            self._used[report.rank], when = (used, now), now
        if silent < self.stall:
            return ""
        if is_stopped(report.pid):
            return "stopped"
        return "works" if now - when < self.stall / 2 else ""  # in a library that lets no thread report meanwhile

    def _speaks(self) -> bool:
        """Whether this rank says what there is to say: rank 0 does, and rank 1 where that does not answer."""
        if self.rank > 1 or self._reports is None:
            return self.rank == 0
        first = self._seen().get(0)
        return self.rank == 0 or (first is not None and (first.silent >= self.stall or bool(first.state)))

    def _judge(self) -> None:
        """Say what keeps the run."""
        if self._reports is not None:
            self._reports.reads_all = self.rank == 0 or self._concludes or self._speaks()
        self._notice_silent_store()
        if not self._speaks() or self._concludes:
            return
        found, now = verdict(self._seen(), self.world_size, self.stall, self.busy), time.monotonic()
        before, self._verdict = self._verdict, found
        if found is not None and found.kind == "gone":
            self._claim(f"{spoken(found.about)} {found.words}", found.line)
            return
        was_late, is_late = (each is not None and each.kind == "late" for each in (before, found))
        if found is not None and is_late and not was_late:
            self._since = now - self.stall
            _say(f"warning: {found.line}. {self._what_now()}")
        elif found is not None and before is None:
            _say(f"note: {found.line}")
        elif was_late and found is None:
            _say(f"note: the run goes on, after {minutes(now - self._since)}")
        self.trouble = found.line if found is not None and is_late else None
        if self.trouble and self.world_size > 1 and now - self._since > self.timeout:
            self._claim(self._no_progress, f"{self._no_progress} (`timeout`): {self.trouble}")

    def _notice_silent_store(self) -> None:
        """Where the store does not answer, since its process was stopped, no rank can learn of a failure by it."""
        if self._reports is None:
            return
        unanswered = time.monotonic() - self._reports.answered
        if unanswered >= self.stall and not self._speaks():
            self.trouble = f"the store at which the ranks met has not answered for {minutes(unanswered)}"
        if unanswered >= self.timeout and self.trouble:
            self._claim(self.trouble, self.trouble)
        if unanswered > 2 * NEWS and self._reports.claim is not None:
            self.failure = self.failure or self._reports.claim

    @property
    def _no_progress(self) -> str:
        return f"the run has not gone on for {minutes(self.timeout)}"

    def _what_now(self) -> str:
        if self.world_size == 1:
            return "The run waits; Ctrl-C twice ends it"
        return f"The run ends after {minutes(self.timeout)} of this (`timeout`), or by Ctrl-C or SIGTERM at once"

    # -- ends

    def _claim(self, words: str, text: str) -> None:
        """Say to all ranks that the run fails, unless one has said so."""
        if self._reports is not None:
            self._reports.claim = self._reports.claim or Failure(self.rank, words, text)
            self._hurry.set()

    def _end(self) -> None:
        """End this process, since the run fails: its main thread may wait for ever."""
        failure = self.failure
        assert failure is not None
        self._ended.wait(GRACE)
        if self._ended.is_set() or not self._ending.acquire(blocking=False):
            return
        if failure.by == self.rank:
            self._wait_for_others()
            _say(f"error: {failure.text}")
            tell_launcher(failure.text)
            os._exit(ERROR)
        self._give_way(failure)
        os._exit(FAILED)

    def _give_way(self, failure: Failure) -> None:
        """Say why this rank ends, and wait until the rank that failed has said why it did."""
        assert self._reports is not None
        _say(f"rank {self.rank} ends because {failure.words}")
        self._reports.has_spoken = True
        until = time.monotonic() + 5 * GRACE
        while time.monotonic() < until and not self._is_gone(failure.by):
            time.sleep(0.1)

    def _is_gone(self, rank: int) -> bool:
        seen = self._reports.seen.get(rank) if self._reports is not None else None
        return seen is not None and seen[0].host == self._host and is_gone(seen[0].pid)

    def _wait_for_others(self) -> None:
        """Wait until the other ranks have said that they end: the last words are this one's."""
        assert self._reports is not None
        until = time.monotonic() + 2 * self.beat + 3 * GRACE
        while time.monotonic() < until and self._reports.have_spoken < sum(
            not self._is_gone(rank) for rank in range(self.world_size) if rank != self.rank
        ):
            time.sleep(0.1)

    def conclude(self, error: BaseException) -> BaseException | None:
        """What ends this rank in place of ``error``; None where that is its own."""
        if self._reports is None or getattr(error, "is_everywhere", False):  # raised by all ranks alike
            return None
        self._ending.acquire()  # for ever, if the other thread is about to end the process
        self._concludes = self._reports.reads_all = True
        self._hurry.set()
        with _without_signals():  # this process ends by itself within seconds
            return self._concluded(error, self._reports)

    def _concluded(self, error: BaseException, reports: Reports) -> BaseException | None:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            self._claim(f"rank {self.rank} was ended", "")
            self._wait_for_failure(GRACE)
            return None
        own = not (isinstance(error, AnotherRankError) or _is_of_connection(error))
        if own:
            self._claim(f"rank {self.rank} failed", str(error))
        self._wait_for_failure(NEWS)
        if self.failure is None:
            own = own or not _is_lost(error)
            self._claim(*self._what_is_lost(error))
            self._wait_for_failure(GRACE)
        failure = self.failure or reports.claim
        assert failure is not None
        if failure.by == self.rank:
            self._wait_for_others()
            return None if own else LostRankError(failure.text)
        if isinstance(error, UserError) and str(error) == failure.text:
            error.is_said = reports.has_spoken = True
            return None
        self._give_way(failure)
        return AnotherRankError(f"rank {self.rank} ends because {failure.words}")

    def _wait_for_failure(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.failure is None and time.monotonic() < until:
            time.sleep(0.05)
            found = verdict(self._seen(), self.world_size, self.stall, self.busy)
            if found is not None and found.kind == "gone":
                self._claim(f"{spoken(found.about)} {found.words}", found.line)

    def _what_is_lost(self, error: BaseException) -> tuple[str, str]:
        """In few words and in more: the cause of a connection's error, where no rank has said that it failed."""
        if self.trouble is not None:
            return self._no_progress, f"{self._no_progress} (`timeout`): {self.trouble}"
        words = f"rank {self.rank} has lost its connection to another rank"
        return words, f"{words}: {in_brief(RuntimeError(str(error)))}"


def _say(line: str) -> None:
    with suppress(OSError):
        os.write(2, f"{printable_line(without_secrets(line))}\n".encode(errors="backslashreplace"))


@contextmanager
def _without_signals() -> Iterator[None]:
    """Hear neither SIGINT nor SIGTERM in the meantime: launchers send them as soon as one rank has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _is_lost(error: BaseException) -> bool:
    """Whether the text of ``error``, of communication, is that of a connection that has ended, or of a time limit."""
    return isinstance(error, AnotherRankError) or any(
        words in str(error) for words in ("onnection", " peer", "imed out", "imeout", "remote process")
    )


def _is_of_connection(error: BaseException | None) -> bool:
    """Whether ``error``, or one that it was raised from, is one of communication between ranks."""
    while error is not None:
        if isinstance(error, RuntimeError):
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            file = trace.tb_frame.f_code.co_filename if trace is not None else ""
            text = str(error)
            if os.path.join("torch", "distributed", "") in file or "gloo" in text or "NCCL" in text:
                return True
        error = error.__cause__ or error.__context__
    return False
