"""Trains several configurations one after another in one process group, since starting one takes seconds.

torchrun --nproc_per_node 2 tests/train_many.py '[["--config", "a.yaml"], ["--config", "b.yaml"]]'
"""

from __future__ import annotations

import json
import sys

import panda.run.ending
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.processes import leave_processes
from panda.runner import train

panda.run.ending.ANSWER_TOKENS = 2  # under ZeRO-3 answers take longer than the training

NOTHING_DRAWN = ["-p", "no:plot", "-p", "no:tensorboard"]
"""Drawing a plot takes longer than the steps that it shows."""

for argv in json.loads(sys.argv[1]):
    train(configure(parse_arguments([*argv, *NOTHING_DRAWN])))
leave_processes()
