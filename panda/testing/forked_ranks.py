"""Runs a function in several ranks, forks of this process: what it has imported, they need not import again."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

SECONDS_TO_SAY_WHY = 5
"""After a rank has failed, the others may end by themselves for so long: they wait for it in a collective."""


def on_ranks(do: Callable[[], None], ranks: int, output: Path) -> bool:
    """Whether ``do()`` ended without an error in each of ``ranks`` processes, which can form a process group.

    Each appends what it prints to ``output``. This process must have no other threads.
    """
    port = _free_port()
    pids = []
    for rank in range(ranks):
        pids.append(os.fork())
        if not pids[-1]:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            numbers["MASTER_PORT"] = port
            place = {key: str(value) for key, value in numbers.items()}
            _become_rank(do, {**place, "MASTER_ADDR": "127.0.0.1"}, output)
    return not any(_ended(pids))


def _become_rank(do: Callable[[], None], place: dict[str, str], output: Path) -> None:
    """Be one rank of a run to its end: this does not return."""
    code = 1
    try:
        os.environ.update(place)
        opened = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        sys.stdout.flush()
        for descriptor in (1, 2):
            os.dup2(opened, descriptor)
        do()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ended(pids: list[int]) -> list[int]:
    """The exit codes of ``pids``, once all have ended."""
    codes: dict[int, int] = {}

    def kill_others(*_: object) -> None:
        for pid in set(pids) - set(codes):
            os.kill(pid, signal.SIGKILL)

    before = signal.signal(signal.SIGALRM, kill_others)
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            signal.alarm(SECONDS_TO_SAY_WHY)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    return [codes[pid] for pid in pids]


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
    return port
