"""Interrupting a run from outside: the first SIGINT or SIGTERM has it save and end, the second ends it at once."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path

from panda.registry.errors import EndedBySignal

SAVED = 75
"""The exit code of a run that was interrupted and has saved: EX_TEMPFAIL of sysexits.h, "try again"."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO_SECONDS = 1.0
"""Under a launcher, signals this soon after the first are the same one: Ctrl-C in a terminal reaches torchrun and its
ranks, and torchrun passes it on to the ranks once more."""
PASSED_ON = "PANDA_SIGNALS_ARE_PASSED_ON"
"""Of the environment: set by what starts runs and passes its signals on to them, as `panda sweep` does."""
UNHEARD_SECONDS = 3.0
"""So long after a signal, the process is ended if its main thread has not come to it."""
LOOK_SECONDS = 1.0
"""Seconds between two looks, after a signal, at whether a rank has been lost since."""

_END = b"\0"


class Interrupted(KeyboardInterrupt):
    """A run was interrupted and has saved. Raised on all ranks; the text says how to go on."""

    is_everywhere = True


class Interruption:
    """What has asked this process to end, by a signal.

    A thread hears the signals, so that the second one ends the process also where it waits for another rank in C.
    """

    def __init__(
        self,
        *,
        launched: bool,
        announce: bool,
        hopeless: Callable[[], str | None] = lambda: None,
        is_ending: Callable[[], bool] = lambda: False,
    ) -> None:
        """``launched``: by a launcher, which may repeat signals. ``announce``: print that a signal has been heard.

        ``hopeless``: why the step under way will not end, such as a rank that is lost; None where it may. A signal then
        ends the process at once. ``is_ending``: whether the process ends by itself, since another rank has failed.
        """
        self.signal: signal.Signals | None = None
        """The first one; None for none."""
        self._launched, self._announce, self._hopeless, self._is_ending = launched, announce, hopeless, is_ending
        self._first = 0.0
        self.restore: Callable[[], None] = lambda: None
        """Gives the signals back to who had them before."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear signals in the meantime. Does nothing in a thread other than the main one, which gets no signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ours, pythons = socket.socketpair()
        pythons.setblocking(False)
        thread = threading.Thread(target=self._hear, args=(ours,), name="signals", daemon=True)
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        before = -1

        def restore() -> None:
            signal.set_wakeup_fd(before)
            for number, handler in handlers.items():
                signal.signal(number, handler)

        self.restore = restore
        _listening.append(self)
        thread.start()
        for number in SIGNALS:
            signal.signal(number, self._heard_by_python)
        before = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            restore()
            _listening.remove(self)
            pythons.send(_END)
            thread.join()
            ours.close()
            pythons.close()

    def _heard_by_python(self, number: int, frame: object) -> None:
        """Python writes a signal to the wake-up descriptor only where it has a handler."""

    def _hear(self, ours: socket.socket) -> None:
        ours.settimeout(LOOK_SECONDS)
        while True:
            try:
                heard = ours.recv(1)
            except TimeoutError:
                self._look()
                continue
            if heard == _END:
                return
            with suppress(ValueError):  # a signal of somebody else's
                self._take(signal.Signals(heard[0]))

    def _take(self, heard: signal.Signals) -> None:
        now = time.monotonic()
        if heard not in SIGNALS or self._is_ending():
            return
        if self.signal is None:
            self.signal, self._first = heard, now
            if self._announce and not self._hopeless():
                print(f"{heard.name}: the run ends after this step, and saves; once more ends it at once", flush=True)
            self._look()
        elif not self._launched or now - self._first > ECHO_SECONDS:
            self._end(heard, f"ended at once by a second signal, {heard.name}")

    def _look(self) -> None:
        """End the process after the first signal where the step under way will not end."""
        if self.signal is not None and not self._is_ending() and (why := self._hopeless()):
            self._end(self.signal, f"ended at once by {self.signal.name}, without saving, since {why}")

    def _end(self, heard: signal.Signals, line: str) -> None:
        with suppress(OSError):
            os.write(2, f"{line}\n".encode(errors="backslashreplace"))
        os._exit(128 + heard)  # not SystemExit: the main thread may wait for a rank that never comes


class Ending(Interruption):
    """Before and after the steps of a run: a signal ends it by an exception, so that hooks are called.

    A thread ends the process where the main thread does not come to that, since it waits in C.
    """

    def __init__(self, *, launched: bool) -> None:
        super().__init__(launched=launched, announce=False)
        self._is_raised = False

    def _heard_by_python(self, number: int, frame: object) -> None:
        self._is_raised = True
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise EndedBySignal(128 + number)

    def _look(self) -> None:
        if self.signal is None or self._is_raised:
            return
        if time.monotonic() - self._first > UNHEARD_SECONDS:
            self._end(self.signal, f"ended by {self.signal.name}")


_listening: list[Interruption] = []


def _hear_nothing_in_fork() -> None:
    """In a process that was just forked, which shares the socket: a signal to it is not one to its parent."""
    for each in _listening:
        each.restore()
    _listening.clear()


os.register_at_fork(after_in_child=_hear_nothing_in_fork)


def how_to_continue(directory: Path, checkpoint: Path | None, flags: str = "", *, exactly: bool = False) -> str:
    """A line for a shell, in any folder, that continues the run in ``directory`` from ``checkpoint``, after a word.

    Where that is None, or the one of another run from which this one began, it begins again from there. On one machine
    it starts as many ranks as there are. ``flags``: more of them, quoted, with a space before.
    ``exactly``: from that one, also where the run has newer ones.
    """
    program = _program("panda-train", "panda.cli.train")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    launched = ""
    if 1 < ranks == int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        launcher = _program("torchrun", "torch.distributed.run")
        script = program[1:] or ["--no-python", *program]
        program = [*launcher, "--standalone", "--nproc_per_node", str(ranks), *script]
    elif ranks > 1:
        launched = " (with the launcher of this run, on each of its machines)"
    run, checkpoint = directory.absolute(), checkpoint.absolute() if checkpoint else None
    is_own = checkpoint is not None and checkpoint.parent.parent.resolve() == run.resolve()
    if is_own:
        resume = ["--resume", str(checkpoint if exactly else run)]
    elif exactly:  # it has later ones of its own, which `auto` would prefer
        resume = ["--config", f"{run}/config.yaml", "--resume", str(checkpoint), "--output_dir", f"{run}-again"]
    else:
        resume = ["--resume", "auto", "--output_dir", str(run)]
    return f"to {'continue it' if is_own else 'begin it again'}{launched}: {shlex.join([*program, *resume])}{flags}"


def _program(name: str, module: str) -> list[str]:
    """The words that start the program ``name`` of this Python: its name where the shell finds it by that."""
    own = Path(sys.executable).with_name(name)
    if not own.exists():
        return [sys.executable, "-m", module]
    found = shutil.which(name)
    return [name] if found and Path(found).resolve() == own.resolve() else [str(own)]
