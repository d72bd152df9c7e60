"""``panda-train``: train what the flags and the YAML file describe."""

from __future__ import annotations

import os
import signal
import sys

from panda.cli.arguments import parse_arguments
from panda.cli.command import run_command
from panda.cli.configuration import configure
from panda.cli.help import print_train_help
from panda.registry import UserError
from panda.registry.resolve import Resolved


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda-train``."""
    return run_command(_train, argv)


def _train(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    if arguments.help:
        print_train_help(arguments)
        return
    resolved, hooks = configure(arguments)
    _look_first(resolved)
    # Threads that wait for others by spinning slow down a hundredfold, measured, as soon as anything
    # else wants one of their cores. The OpenMP of torch reads this when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from panda.engine.processes import leave_processes
    from panda.runner import train

    signal.signal(signal.SIGTERM, _stop)
    try:
        train(resolved, hooks)
    except UserError:
        leave_processes()
        raise
    leave_processes()


def _look_first(resolved: Resolved) -> None:
    """Raise UserError for what is not there, as far as that can be seen without importing torch."""
    from panda.engine.deepspeed_config import deepspeed_config
    from panda.models.tokenizers import tokenizer_folder
    from panda.run_directory import find_directory
    from panda.run_directory import goes_on
    from panda.run_lock import check_free

    deepspeed_config(resolved.core, world_size=int(os.environ.get("WORLD_SIZE", 1)), on_gpu=False)
    tokenizer_folder(resolved.core.tokenizer)
    directory, checkpoint = find_directory(resolved)
    if goes_on(resolved, directory, checkpoint):
        check_free(directory)


def _stop(signal_number: int, frame: object) -> None:
    """Schedulers end a job with SIGTERM: hooks hear of it, as of Ctrl-C."""
    raise SystemExit(128 + signal_number)


if __name__ == "__main__":  # torchrun -m panda.cli.train
    sys.exit(main())
