"""A step is the same however it is split: over micro batches, over ranks, and under every stage of ZeRO."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
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
"""Of a step, in each split."""
LAST = 2
"""Rows of the last step, of three: too few for two ranks with three each, of which one is idle then."""
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
    "two ranks": (2, {"per_gpu_train_batch_size": 3, "gradient_accumulation_steps": 1, "zero_stage": 0}),
    "ZeRO-1": (2, {"per_gpu_train_batch_size": 1, "gradient_accumulation_steps": 3, "zero_stage": 1}),
    "ZeRO-2": (2, {"per_gpu_train_batch_size": 1, "gradient_accumulation_steps": 3, "zero_stage": 2}),
    "ZeRO-3": (2, {"per_gpu_train_batch_size": 1, "gradient_accumulation_steps": 3, "zero_stage": 3}),
}
TRIED = [("kto", split) for split in SPLITS] + [
    *(("dpo", "ZeRO-3"), ("ipo", "two ranks"), ("simpo", "ZeRO-1"), ("orpo", "ZeRO-2"), ("distill", "ZeRO-3")),
    *(("reward", "ZeRO-1"), ("reward", "ZeRO-3")),
]
"""What the stages of ZeRO do does not depend on the loss: the task with both a reference and statistics of the step is
tried in each split, and one with a head of its own where that is partitioned differently."""


def options_of(task: str, tiny: Path, rows: Path) -> dict[str, Any]:
    """The options of three steps of all rows."""
    data = {"preference_data_dir": rows}
    if task == "distill":
        data = {"instruction_tuning_data_dir": rows, "teacher_path": tiny / "teacher"}
    return {
        "task": "dpo" if task == "ipo" else task,
        "ckpt_path": tiny / "model",
        "tokenizer": tiny / "model",
        **data,
        **TASKS[task],
        "template": "plain",
        "eval_data_dir": rows,
        "max_seq_length": 64,
        "num_train_epochs": 2 + LAST / ROWS,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-3,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0,
        "num_workers": 0,
        "save_final": "false",
    }


def rows_of(task: str) -> list[dict[str, Any]]:
    if task == "kto":
        return LABELLED
    if task == "distill":
        return [{"input": pair["prompt"], "target": pair["chosen"]} for pair in MORE_PAIRS]
    return MORE_PAIRS


MORE_PAIRS = [
    *PAIRS,
    {"prompt": "what eats fish", "chosen": "the heron eats a small fish", "rejected": "a stone"},
    {"prompt": "where does it waits", "chosen": "over water", "rejected": "where the frog sings and the fish sleeps"},
]


def values(run: Path) -> list[dict[str, float]]:
    """Of each step and evaluation, the loss, the metrics and the norm of gradients."""
    kept = ("loss", "grad_norm", "rewards", "logps", "kl", "nll_loss", "log_odds", "agreement", "cross_entropy")
    return [
        {name: value for name, value in record.items() if name.removeprefix("eval_").startswith(kept)}
        for record in [*read_metrics(run), *read_evaluations(run)]
    ]


Whole = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def whole(train: Train, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Of a task, its rows and a run in one process with all of them in one micro batch."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def of(task: str) -> tuple[Path, Path]:
        rows = rows_file(folder / f"{task}-rows", rows_of(task))
        at_once = {"per_gpu_train_batch_size": ROWS, "gradient_accumulation_steps": 1, "per_gpu_eval_batch_size": ROWS}
        train(folder / task, **options_of(task, tiny, rows), **at_once)
        return rows, folder / task

    return of


@pytest.mark.parametrize(("task", "split"), TRIED)
def test_a_split_step_is_the_same(
    task: str, split: str, whole: Whole, train: Train, tiny: Path, tmp_path: Path
) -> None:
    rows, expected = whole(task)
    ranks, options = SPLITS[split]
    train(tmp_path / "run", ranks=ranks, **options_of(task, tiny, rows), **options)
    found, wanted = values(tmp_path / "run"), values(expected)
    assert len(found) == len(wanted) == 4 and len(wanted[0]) >= 4 and len(wanted[-1]) >= 3
    for number, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            # Rewards are differences of log-probabilities around -20, of which float32 has every 2e-6th.
            near = 1e-6 if name in ("loss", "eval_loss") else 5e-6
            assert mine[name] == pytest.approx(value, rel=1e-6, abs=near), (number, name)
