"""The variables by which a launcher tells a process its place among the ranks; others may be left over in a shell."""

from __future__ import annotations

import os

from panda.registry import UserError

_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")


def forget_empty() -> None:
    """Remove variables of a launcher that are set to nothing, which everybody would have to read as not set."""
    for name in (*_PLACE, *_MEETING):
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
