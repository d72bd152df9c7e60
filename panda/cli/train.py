"""``panda-train``: trains what the flags and the YAML file describe."""

from __future__ import annotations

import os
import sys

from panda.cli.command import print_version
from panda.cli.command import run_command
from panda.run.interruption import PASSED_ON
from panda.run.interruption import Ending


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda-train``."""
    return run_command(_train, argv)


def _train(argv: list[str]) -> None:
    if argv in (["--version"], ["-V"]):
        print_version()
        return
    # Not before: until `run_command` runs, Ctrl-C prints a traceback.
    from panda.cli.help import print_train_help
    from panda.configuration.arguments import parse_arguments
    from panda.training import train_arguments

    arguments = parse_arguments(argv)
    if arguments.help:
        print_train_help(arguments)
        return
    with Ending(launched=bool({"RANK", PASSED_ON} & {*os.environ})).listening():
        train_arguments(arguments)


if __name__ == "__main__":  # torchrun -m panda.cli.train
    sys.exit(main())
