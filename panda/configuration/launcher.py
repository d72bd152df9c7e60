"""The variables by which a launcher tells a process its place among the ranks; others may be left over in a shell."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from panda.registry import UserError

_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")


class LostRankError(UserError):
    """Another rank is lost, so that nothing can be waited for: not even the end of the interpreter."""


class AnotherRankError(LostRankError):
    """This rank ends because of another one, and has said so: nothing is left to be printed."""


def forget_empty() -> None:
    """Remove variables of a launcher, and HOME, that are set to nothing: everybody would have to read them as not set.

    With an empty HOME, ``~/.cache`` is ``/.cache``, which root could make.
    """
    for name in (*_PLACE, *_MEETING, "HOME"):
        if not os.environ.get(name, "x").strip():
            del os.environ[name]


def check_launcher() -> None:
    """Raise UserError where only some of the variables are set, or they contradict each other."""
    forget_empty()
    given = {name: os.environ[name] for name in _PLACE if name in os.environ}
    said = ", ".join(f"{name}={value}" for name, value in given.items())
    then = f"Start every rank with torchrun or deepspeed, which set all; or for one process `unset {' '.join(given)}`."
    if wrong := [name for name, value in given.items() if not value.strip().isdecimal()]:
        raise UserError(f"{said} in the environment: {wrong[0]} is not a number of ranks. {then}")
    ranks, rank = int(given.get("WORLD_SIZE", 1)), int(given.get("RANK", 0))
    needed = ("RANK", "WORLD_SIZE", *_MEETING) if ranks > 1 or rank > 0 else ()
    if missing := [name for name in needed if name not in os.environ]:
        raise UserError(f"{said} in the environment, and no {' and '.join(missing)}: left over from a launcher? {then}")
    if not rank < max(ranks, 1) or ranks < 1:
        raise UserError(f"{said} in the environment: ranks count from 0 to one less than WORLD_SIZE. {then}")


def processes_here() -> int:
    """How many processes of the run were started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torchrun, deepspeed


def tell_launcher(text: str) -> None:
    """Let torchrun, which ends the other ranks and lists how all ended, name this one as the cause."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        more = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": more}}), encoding="utf-8")
