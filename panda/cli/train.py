"""``panda-train``: trains what the flags and the YAML file describe."""

from __future__ import annotations

import os
import signal
import sys

from panda.cli.command import announce_loading
from panda.cli.command import run_command
from panda.cli.help import print_train_help
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.registry import UserError


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda-train``."""
    return run_command(_train, argv)


def _train(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    if arguments.help:
        print_train_help(arguments)
        return
    configuration = configure(arguments)

    from panda.run.first_look import look_first
    from panda.run.sources import with_lasting_sources

    configuration = with_lasting_sources(configuration)
    look_first(configuration, int(os.environ.get("WORLD_SIZE", 1)))
    # By default the OpenMP threads of torch (2.13, 2026-11) spin while they wait for each other, which makes them a
    # hundred times slower, measured, as soon as another process wants one of their cores. OpenMP reads this variable
    # when torch loads it; it can go when torch's threads sleep by default.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    announce_loading()

    from panda.engine.processes import leave_processes
    from panda.runner import train

    signal.signal(signal.SIGTERM, _stop)
    try:
        train(configuration)
    except UserError:
        leave_processes()
        raise
    leave_processes()


def _stop(signal_number: int, frame: object) -> None:
    """Turn SIGTERM, with which schedulers end a job, into an exception, as Ctrl-C does, so that hooks are called."""
    raise SystemExit(128 + signal_number)


if __name__ == "__main__":  # torchrun -m panda.cli.train
    sys.exit(main())
