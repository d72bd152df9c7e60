"""Where the ranks of a run meet: a store at MASTER_ADDR and MASTER_PORT, which all reach within `timeout`, or the run
ends in words."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore  # its public name has no type in torch 2.13
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it has no stub in torch 2.13

from panda.registry import UserError

SAY_AFTER = 20.0
"""Seconds that ranks wait for others before that is said."""
ANSWER_SECONDS = 10.0
"""Seconds in which the store answers."""
_ALL = "all"

_hosted: dict[int, TCPStore] = {}
"""Stores of this process, by port: they live as long as it does, since the others may end later."""


def spoken(ranks: Iterable[int]) -> str:
    """Numbers of ranks as text: `rank 3`, or `ranks 0, 2 to 5 and 7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = []
    for run in runs:
        words += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(rank) for rank in run]
    *first, last = words
    together = f"{', '.join(first)} and {last}" if first else last
    return f"rank{'s' if len(runs) > 1 or len(runs[0]) > 1 else ''} {together}"


def minutes(seconds: float) -> str:
    """Seconds as text, in minutes from two on."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def place() -> str:
    """The address at which the ranks meet, and where it comes from."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR and MASTER_PORT)"


def reach(rank: int, timeout: float) -> tuple[Any, Any]:
    """The store of this process and a second connection to it, for another thread: a call occupies its connection.

    Rank 0 opens it where no launcher has. Raises UserError if it cannot be reached within ``timeout`` seconds.
    """
    begun, address = time.monotonic(), os.environ["MASTER_ADDR"]
    try:
        port = int(os.environ["MASTER_PORT"])
    except ValueError:
        raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']} in the environment is not a number.") from None
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return _host(port), _connected("127.0.0.1", port)
    says = _Saying(timeout)
    while True:
        try:
            # By a socket of its own first, since torch (2.13) writes lines of C++ about every attempt.
            socket.create_connection((address, port), ANSWER_SECONDS).close()
            return _connected(address, port), _connected(address, port)
        except (OSError, RuntimeError) as problem:
            why = problem.strerror if isinstance(problem, OSError) else None
            why = why or f"it does not answer as ranks do ({type(problem).__name__})"
        waiting = f"rank {rank} does not reach rank 0 at {place()}: {why}"
        says.after(waiting)
        if time.monotonic() - begun > timeout:
            raise UserError(
                f"{waiting}. It has tried for {minutes(timeout)} (`timeout`). Rank 0 has to be started on that"
                " machine, and its port be open to the others."
            )
        time.sleep(0.5)


def _host(port: int) -> TCPStore:
    if port not in _hosted:
        try:
            # Reached as this machine itself: a MASTER_ADDR that names another is then seen where it matters, by those
            # who do not arrive.
            _hosted[port] = TCPStore(
                "127.0.0.1",
                port,
                is_master=True,
                wait_for_workers=False,
                multi_tenant=True,
                timeout=timedelta(seconds=ANSWER_SECONDS),
            )
        except RuntimeError as problem:
            raise UserError(
                f"rank 0 cannot open port {port} (MASTER_PORT), at which the ranks meet: another process of this"
                " machine uses it. Give another one, as with `torchrun --master_port`."
            ) from problem
    return _hosted[port]


def _connected(address: str, port: int) -> TCPStore:
    """A connection. Raises RuntimeError where none comes about, as with a program that listens and says nothing."""
    made: list[TCPStore | RuntimeError] = []

    def connect() -> None:
        limit = timedelta(seconds=ANSWER_SECONDS)
        try:
            made.append(TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit))
        except RuntimeError as problem:
            made.append(problem)

    # In a thread, since torch (2.13) waits for the first answer without a limit.
    thread = threading.Thread(target=connect, name="meeting", daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not made:
        raise RuntimeError(f"no answer within {ANSWER_SECONDS} s")
    if isinstance(made[0], RuntimeError):
        raise made[0]
    return made[0]


def own_part(store: Any, name: str) -> Any:
    """The part of ``store`` for one group: launchers that start ranks again keep the store."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"panda/{attempt}/{name}", store)


def wait_for_all(
    store: Any, rank: int, world_size: int, timeout: float, prepares: Callable[[int], bool] = lambda rank: False
) -> None:
    """Wait until all ranks are here. Raises UserError where some are not within ``timeout`` seconds.

    ``prepares``: whether rank 0 knows that a rank is at work, say on its data: such a one is waited for. Of ``store``,
    its part for this meeting.
    """
    store.set(f"{rank}", str(os.getpid()))
    if rank > 0:
        _wait_for_word(store, rank)
        return
    missing, says, alive_at = set(range(world_size)), _Saying(timeout), time.monotonic()
    while True:
        missing = {other for other in missing if not store.check([f"{other}"])}
        if not missing:
            store.set(_ALL, "")
            return
        unknown = {other for other in missing if not prepares(other)}
        if not unknown:
            alive_at = time.monotonic()
            says.again()
        waiting = f"{_have(unknown or missing)} not arrived at {place()}"
        says.after(f"{waiting}: {world_size - len(missing)} of {world_size} are here (WORLD_SIZE)")
        if time.monotonic() - alive_at > timeout:
            raise UserError(
                f"{waiting} within {minutes(timeout)} (`timeout`); {world_size - len(missing)} of {world_size}"
                " (WORLD_SIZE) are here. Start them all, with the same address."
            )
        time.sleep(0.02 if says.waited < 2 else 0.3)


def _wait_for_word(store: Any, rank: int) -> None:
    """Wait until rank 0 says that all are here: it also says who is not, and for how long it waits."""
    begun = time.monotonic()
    while True:
        try:
            if store.check([_ALL]):
                return
        except RuntimeError as problem:
            raise UserError(f"rank {rank} has lost rank 0 at {place()}, before all ranks had arrived.") from problem
        time.sleep(0.02 if time.monotonic() - begun < 2 else 0.3)


def _have(ranks: Iterable[int]) -> str:
    ranks = list(ranks)
    return f"{spoken(ranks)} {'has' if len(ranks) == 1 else 'have'}"


class _Saying:
    """Says once what is waited for, when that has taken long."""

    def __init__(self, timeout: float) -> None:
        self._after = min(SAY_AFTER, timeout / 4)
        self.again()

    @property
    def waited(self) -> float:
        return time.monotonic() - self._begun

    def again(self) -> None:
        """Count the time of waiting from now."""
        self._begun, self._is_said = time.monotonic(), False

    def after(self, line: str) -> None:
        if not self._is_said and self.waited > self._after:
            self._is_said = True
            with suppress(OSError):
                print(f"waiting: {line}", file=sys.stderr, flush=True)
