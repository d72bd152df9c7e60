"""A step is the same however it is split: over micro batches, over ranks, and under every stage of ZeRO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from panda.hooks.metrics import read_evaluations
from panda.hooks.metrics import read_metrics
from runs import Train
from runs import rows_file
from tiny import LABELLED
from tiny import PAIRS

ROWS = 6
"""A number that two ranks of two rows a micro batch do not divide: the last micro batch of a step has an idle rank."""
TASKS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.5},
    "ipo": {"beta": 0.2, "loss_type": "ipo"},
    "kto": {"beta": 0.5, "desirable_weight": 3},
    "orpo": {"beta": 0.3},
    "simpo": {},
    "reward": {"center_rewards_coefficient": 0.1},
    "distill": {"loss_type": "reverse_kl"},
}
SPLITS: dict[str, tuple[int, dict[str, Any]]] = {
    "two micro batches": (1, {"per_gpu_train_batch_size": 4, "gradient_accumulation_steps": 2}),
    "two ranks": (2, {"per_gpu_train_batch_size": 4, "gradient_accumulation_steps": 1, "zero_stage": 0}),
    "two ranks, ZeRO-1": (2, {"per_gpu_train_batch_size": 2, "gradient_accumulation_steps": 2, "zero_stage": 1}),
    "two ranks, ZeRO-2": (2, {"per_gpu_train_batch_size": 2, "gradient_accumulation_steps": 2, "zero_stage": 2}),
    "two ranks, ZeRO-3": (2, {"per_gpu_train_batch_size": 2, "gradient_accumulation_steps": 2, "zero_stage": 3}),
}
