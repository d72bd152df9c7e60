"""``panda-train``: train what the flags and the YAML file describe."""

from __future__ import annotations

import os
import sys

from panda.cli.arguments import parse_arguments
from panda.cli.command import run_command
from panda.cli.configuration import configure
from panda.cli.help import print_train_help


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda-train``."""
    return run_command(_train, argv)


def _train(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    if arguments.help:
        print_train_help(arguments)
        return
    resolved, catalog = configure(arguments)
    # Threads that wait for others by spinning slow down a hundredfold, measured, as soon as anything
    # else wants one of their cores. The OpenMP of torch reads this when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from panda.engine.processes import leave_processes
    from panda.runner import train

    train(resolved, catalog)
    leave_processes()


if __name__ == "__main__":  # torchrun -m panda.cli.train
    sys.exit(main())
