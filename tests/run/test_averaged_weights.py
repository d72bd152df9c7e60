"""Where an optimizer trains with other weights than it evaluates, the latter are evaluated, exported and saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import EVERY_WAY
from launching import exported_weights
from launching import metrics
from launching import train_many
from launching import zero3_at_once
from safetensors.torch import load_file

from panda.cli.export import main as export_main
from panda.engine.freezing import Freezing
from panda.optim.averaging import ScheduleFreeAdamW
from panda.registry import UserError

SHAPE = ("--arch", "llama-tiny", "--num_layers", 2, "--hidden_size", 32, "--intermediate_size", 48, "--num_heads", 2)
DATA = ("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--eval_data_dir", "held-out.json")
RUN = (
    *DATA,
    *("--max_seq_length", 48, "--num_workers", 0, "--per_gpu_train_batch_size", 3, "--gradient_accumulation_steps", 2),
    *("--optimizer", "schedule_free_adamw", "--learning_rate", 0.01, "--lr_scheduler", "constant"),
    *("--warmup_steps", 2, "--max_steps", 6, "--save_steps", 3, "--eval_steps", 2, "--prompts", "a"),
)
RANKS = {"fp32-0": 1, "fp32-3": 2, "bf16-1": 2}
if EVERY_WAY:
    RANKS |= {"bf16-0": 1, "fp32-2": 2, "bf16-3": 2}
EVALUATED = [name for name in RANKS if name.startswith("fp32")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs by precision and ZeRO stage, and runs that evaluate their exports."""
    folder = tmp_path_factory.mktemp("averaged")
    rows = [{"input": f"say {number}", "target": f"{number} and {number + 1}"} for number in range(12)]
    (folder / "held-out.json").write_text(json.dumps(rows))
    for ranks in (1, 2):
        runs: list[list[object]] = []
        for name in [name for name, number in RANKS.items() if number == ranks]:
            precision, stage = name.split("-")
            more = zero3_at_once(folder) if stage == "3" else ["--zero_stage", stage]
            runs.append([*SHAPE, *RUN, "--precision", precision, *more, "--output_dir", folder / name])
        train_many(runs, ranks=ranks, cwd=folder)
    still = ("--optimizer", "adamw", "--learning_rate", 1e-30, "--lr_scheduler", "constant", "--max_steps", 1)
    train_many(
        [
            [
                *DATA,
                *("--max_seq_length", 48, "--num_workers", 0, "--per_gpu_train_batch_size", 3),
                *("--ckpt_path", folder / name / "export", "--output_dir", folder / f"{name}-still", *still),
            ]
            for name in EVALUATED
        ],
        cwd=folder,
    )
    return folder


@pytest.mark.parametrize("name", EVALUATED)
def test_the_last_evaluation_is_of_what_is_exported(folder: Path, name: str) -> None:
    evaluated, still = (
        [record["eval_loss"] for record in metrics(folder / run) if "eval_loss" in record]
        for run in (name, f"{name}-still")
    )
    assert evaluated[-1] == pytest.approx(still[-1], rel=1e-6)
    assert len(set(evaluated)) == 3


@pytest.mark.parametrize("name", RANKS)
def test_checkpoints_hold_what_is_exported(folder: Path, tmp_path: Path, name: str) -> None:
    assert export_main([str(folder / name), "--output", str(tmp_path / "out")]) == 0
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), exported_weights(folder / name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_freezing_is_refused() -> None:
    """What is frozen is the weight that is trained, and its average would still decay."""
    module = torch.nn.Linear(2, 2)
    optimizer = ScheduleFreeAdamW(module.parameters())
    with pytest.raises(UserError, match="freeze: this optimizer evaluates an average"):
        Freezing(module, optimizer, optimizer).freeze(["weight"])
