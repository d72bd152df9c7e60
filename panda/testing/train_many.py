"""Trains several configurations one after another in one process group, since starting one takes seconds.

torchrun --nproc_per_node 2 -m panda.testing.train_many '[["--config", "a.yaml"], ["--config", "b.yaml"]]' [OUTCOMES]

With a folder OUTCOMES a run that is refused does not end the others: the file of its number there, written when a run
has ended, has the message.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import panda.run.ending
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.processes import leave_processes
from panda.registry import UserError
from panda.runner import train
from panda.testing.runs import NOTHING_DRAWN


def train_many(configurations: list[list[str]], outcomes: Path | None = None) -> None:
    """Train each of ``configurations``, the flags of a run."""
    panda.run.ending.ANSWER_TOKENS = 2  # under ZeRO-3 answers take longer than the training
    for number, argv in enumerate(configurations):
        refused = ""
        try:
            train(configure(parse_arguments([*argv, *NOTHING_DRAWN])))
        except UserError as problem:
            if outcomes is None:
                raise
            refused = str(problem)
        if outcomes is not None and os.environ.get("RANK", "0") == "0":
            (outcomes / str(number)).write_text(refused)
    leave_processes()


if __name__ == "__main__":
    train_many(json.loads(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
