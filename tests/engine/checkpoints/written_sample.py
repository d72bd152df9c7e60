"""Writes samples/step-00000002, a checkpoint of this version, which later versions have to read.

    python tests/engine/checkpoints/written_sample.py FOLDER

Never write one of an older format again: add that of a new format beside it.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from panda.configuration.options import RunOptions
from panda.engine.checkpoints.folders import Progress
from panda.engine.checkpoints.writing import save_checkpoint
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.engine import Engine
from panda.engine.processes import Processes
from panda.engine.processes import join_processes
from panda.engine.processes import leave_processes

PROGRESS = Progress(2, 8, 100, 60.5, skipped_steps=1, left_out_steps=0, learning_rate_factor=0.5)
AGREEMENT = {"seed": 7, "task": "instruct"}


class Batch:
    tokens = units = 2
    idle = False

    def to(self, device: torch.device) -> Batch:
        return self


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Draws from each generator, so that the loss says whether its state was restored."""
    inputs = torch.tensor([[random.random(), np.random.random(), 1.0, 2.0]]) + torch.rand(2, 4)
    result: torch.Tensor = model(inputs).square().sum()
    return result


def an_engine(processes: Processes, zero_stage: int = 1) -> Engine:
    """One whose weights are those of no seed: all the same."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.25)
    options = RunOptions(gradient_accumulation_steps=1, zero_stage=zero_stage)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Engine(model, optimizer, deepspeed_config(options, world_size=1, on_gpu=False), processes)


def losses(engine: Engine, count: int) -> list[float]:
    return [float(engine.step([Batch()], loss_sum).loss) for _ in range(count)]


if __name__ == "__main__":
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    made = an_engine(join_processes())
    losses(made, 2)
    print(save_checkpoint(made, Path(sys.argv[1]), PROGRESS, AGREEMENT))
    print(losses(made, 3))
    leave_processes()
