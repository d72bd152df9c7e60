"""Ten optimizer steps of each task are those of TRL, on the same weights and rows, in one micro batch and float32.

trl.json is what record_trl.py recorded of TRL.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from panda.hooks.metrics import read_metrics
from runs import Train
from runs import rows_file
from tiny import LABELLED
from tiny import PAIRS

RECORDED = json.loads((Path(__file__).parent / "trl.json").read_text())
OPTIMIZER = RECORDED["optimizer"]
SAME_NAMES = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}
"""Of TRL's reward trainer, what the other trainers and these tasks call by other names."""
NOT_HERE = {"reward": {"mean_reward", "min_reward", "max_reward"}, "simpo": {"nll_loss"}}
"""Of each task. TRL's SimPO is its CPO without cross-entropy, whose 0 it records."""
TASKS = {
    "dpo-sigmoid": "dpo",
    "dpo-ipo": "dpo",
    "kto": "kto",
    "orpo": "orpo",
    "simpo": "simpo",
    "reward": "reward",
    "reward-centred": "reward",
}
NOT_OPTIONS = {"cpo_alpha"}
"""0 for TRL's CPO trainer to be SimPO's."""
OF_ONE_TASK = {"simpo": ("loss_type",)}
"""Options that say which of TRL's losses is meant, and here the name of the task does."""


@pytest.mark.parametrize("case", RECORDED["cases"])
def test_ten_steps_are_those_of_trl(case: str, train: Train, tiny: Path, tmp_path: Path) -> None:
    recorded = RECORDED["cases"][case]
    task = TASKS[case]
    rows = LABELLED if task == "kto" else PAIRS
    left_out = {*NOT_OPTIONS, *OF_ONE_TASK.get(case, ())}
    options = {name: value for name, value in recorded["options"].items() if name not in left_out}
    model = tiny / ("scorer" if task == "reward" else "model")
    train(
        tmp_path / "run",
        **train_as_recorded(task, model, rows_file(tmp_path / "rows", rows), len(rows)),
        **options,
    )
    found = read_metrics(tmp_path / "run")
    assert len(found) == len(recorded["steps"]) == 10
    for step, (mine, theirs) in enumerate(zip(found, recorded["steps"], strict=True), 1):
        for name, value in theirs.items():
            if name not in NOT_HERE.get(task, ()):
                assert mine[SAME_NAMES.get(name, name)] == pytest.approx(value, rel=0, abs=1e-5), (step, name)


def train_as_recorded(task: str, model: Path, rows: Path, count: int) -> dict[str, Any]:
    return {
        "task": task,
        "ckpt_path": model,
        "tokenizer": model,
        "preference_data_dir": rows,
        "template": "plain",
        "separator": "",
        "max_seq_length": 64,
        "per_gpu_train_batch_size": count,
        "gradient_accumulation_steps": 1,
        "max_steps": 10,
        "optimizer": "adamw",
        "learning_rate": OPTIMIZER["learning_rate"],
        "weight_decay": OPTIMIZER["weight_decay"],
        "adam_betas": f"{OPTIMIZER['adam_beta1']},{OPTIMIZER['adam_beta2']}",
        "adam_epsilon": OPTIMIZER["adam_epsilon"],
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0,
        "num_workers": 0,
        "save_final": "false",
    }
