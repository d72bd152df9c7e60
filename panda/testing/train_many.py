"""Trains several configurations one after another in one process group, since starting one takes seconds.

torchrun --nproc_per_node 2 -m panda.testing.train_many '[["--config", "a.yaml"], ["--config", "b.yaml"]]'
"""

from __future__ import annotations

import json
import sys

import panda.run.ending
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.processes import leave_processes
from panda.runner import train
from panda.testing.runs import NOTHING_DRAWN


def train_many(configurations: list[list[str]]) -> None:
    """Train each of ``configurations``, the flags of a run."""
    panda.run.ending.ANSWER_TOKENS = 2  # under ZeRO-3 answers take longer than the training
    for argv in configurations:
        train(configure(parse_arguments([*argv, *NOTHING_DRAWN])))
    leave_processes()


if __name__ == "__main__":
    train_many(json.loads(sys.argv[1]))
