"""Runs by name, as a user starts them: split in every way, resumed, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from panda.hooks.metrics import read_evaluations
from panda.hooks.metrics import read_metrics
from safetensors.torch import load_file

Train = Callable[..., str]

SMALL: dict[str, Any] = {
    "task": "grpo-given",
    "arch": "llama-tiny",
    "num_layers": 2,
    "hidden_size": 32,
    "prompt_data_dir": "panda_rl:sample/sums",
    "max_samples": 13,
    "num_train_epochs": 1,
    "reward": ("last-number", "pattern"),
    "reward_weights": "1,0.5",
    "pattern": "[a-z1]",
    "max_seq_length": 16,
    "max_completion_length": 4,
    "num_generations": 4,
    "beta": 0.1,
    "optimizer": "adamw",
    "learning_rate": "1e-3",
    "adam_epsilon": "1e-3",
    "lr_scheduler": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "num_workers": 0,
    "save_final": "false",
    "logging_steps": 1,
}
HELD_OUT = [{"question": "2+1", "answer": 3}]
STEP = 6
"""Prompts a step. The last of three steps has one, so that one of two ranks is idle."""
WHOLE = {"per_gpu_train_batch_size": STEP, "gradient_accumulation_steps": 1, "per_gpu_eval_batch_size": 10}
SPLITS: dict[str, tuple[int, dict[str, Any]]] = {
    "micro batches": (1, {"per_gpu_train_batch_size": 2, "gradient_accumulation_steps": 3}),
    "ZeRO-0": (2, {"per_gpu_train_batch_size": 3, "gradient_accumulation_steps": 1, "zero_stage": 0}),
    "ZeRO-1": (2, {"per_gpu_train_batch_size": 1, "gradient_accumulation_steps": 3, "zero_stage": 1}),
    "ZeRO-2": (2, {"per_gpu_train_batch_size": 1, "gradient_accumulation_steps": 3, "zero_stage": 2}),
    "ZeRO-3": (2, {"per_gpu_train_batch_size": 3, "gradient_accumulation_steps": 1, "zero_stage": 3}),
}
LOSSES: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo", "scale_rewards": "batch"},
    "grpo": {"loss_type": "grpo", "num_iterations": 2},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "gspo": {"loss_type": "gspo", "num_iterations": 3, "epsilon": 0.05},
}


def values(run: Path) -> list[dict[str, float]]:
    """Of each step and evaluation, the loss and the metrics that do not depend on the time."""
    timed = ("seconds", "per_second", "wait", "learning_rate", "memory")
    return [
        {name: value for name, value in record.items() if not any(word in name for word in timed)}
        for record in [*read_metrics(run), *read_evaluations(run)]
    ]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a row to evaluate on, so that one of two ranks is idle."""
    file = tmp_path_factory.mktemp("held-out") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))
    return file


TRIED = [("dapo", split) for split in SPLITS] + [("grpo", "ZeRO-3"), ("dr_grpo", "ZeRO-2"), ("gspo", "micro batches")]
"""What the stages of ZeRO do does not depend on the loss: the one with statistics of the step is tried in each split,
and each other one in a split of several micro batches or ranks."""


@pytest.fixture(scope="module")
def whole(train: Train, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Of a loss, the options, and a run in one process with a micro batch a step."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def of(loss: str) -> Any:
        options = SMALL | LOSSES[loss] | {"eval_data_dir": held_out}
        train(folder / loss, **options | WHOLE)
        return options, folder / loss

    return of


@pytest.mark.parametrize(("loss", "split"), TRIED)
def test_a_split_step_is_the_same(
    loss: str, split: str, whole: Callable[[str], Any], train: Train, tmp_path: Path
) -> None:
    ranks, how = SPLITS[split]
    options, folder = whole(loss)
    train(tmp_path / "run", ranks=ranks, **options | how)
    found, wanted = values(tmp_path / "run"), values(folder)
    assert len(found) == len(wanted) == 4
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys() and len(mine) > 10
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


DRAWN = SMALL | {"task": "grpo", "top_p": 0.9, "loss_type": "grpo", "max_steps": 4}


@pytest.fixture(scope="module")
def drawn(train: Train, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose completions the model draws."""
    folder = tmp_path_factory.mktemp("drawn") / "run"
    train(folder, **DRAWN | WHOLE | {"eval_data_dir": held_out, "save_final": "true"})
    return folder


@pytest.mark.parametrize("stage", [1, 3])
def test_completions_do_not_depend_on_the_number_of_ranks(
    drawn: Path, stage: int, train: Train, held_out: Path, tmp_path: Path
) -> None:
    how = {"per_gpu_train_batch_size": 1, "gradient_accumulation_steps": 3, "zero_stage": stage}
    train(tmp_path / "run", ranks=2, **DRAWN | how | {"eval_data_dir": held_out})
    for mine, theirs in zip(values(tmp_path / "run"), values(drawn), strict=True):
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_another_seed_draws_other_completions(drawn: Path, train: Train, tmp_path: Path) -> None:
    train(tmp_path / "run", **DRAWN | WHOLE | {"seed": 7, "max_steps": 1})
    assert values(tmp_path / "run")[0]["entropy"] != values(drawn)[0]["entropy"]


def test_resuming_is_the_same_to_the_bit(drawn: Path, train: Train, held_out: Path, tmp_path: Path) -> None:
    options = DRAWN | WHOLE | {"eval_data_dir": held_out, "save_final": "true"}
    train(tmp_path / "run", **options | {"max_steps": 2})
    train(tmp_path / "run", "--resume", "auto", **options)
    found, expected = values(tmp_path / "run"), values(drawn)
    assert [each["step"] for each in found] == [1, 2, 3, 4, 2, 4], "and two evaluations"
    assert [*found[:4], found[5]] == expected
    weights, wanted = (load_file(next((run / "export").glob("*.safetensors"))) for run in (tmp_path / "run", drawn))
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in wanted.items())


def test_resuming_between_steps_on_the_same_completions(train: Train, tmp_path: Path) -> None:
    """To the bit with as many ranks, and with others to rounding."""
    options = SMALL | {"num_iterations": 3, "max_steps": 4, "learning_rate": "3e-2", "save_steps": 2}
    train(tmp_path / "whole", **options | WHOLE)
    whole = values(tmp_path / "whole")
    assert whole[1]["reward"] == whole[0]["reward"] == whole[2]["reward"] != whole[3]["reward"]
    assert whole[2]["clip_ratio/region_mean"] > 0
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000002"
    split = {"per_gpu_train_batch_size": 3, "gradient_accumulation_steps": 1}
    for ranks, how in ((1, WHOLE), (2, split)):
        train(tmp_path / str(ranks), "--resume", str(checkpoint), ranks=ranks, **options | how)
        for mine, theirs in zip(values(tmp_path / str(ranks)), whole[2:], strict=True):
            assert mine == (theirs if ranks == 1 else pytest.approx(theirs, rel=1e-5, abs=1e-5))
    for file in checkpoint.glob("grpo-completions-*"):
        file.unlink()
    printed = train(tmp_path / "without", "--resume", str(checkpoint), **options | WHOLE)
    assert "it lacks the completions that num_iterations has further steps on" in printed


def test_packed_is_refused(train: Train, tmp_path: Path) -> None:
    printed = train(tmp_path / "run", fails=True, **DRAWN | {"batching": "packed"})
    assert "batching" in printed and "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_records_say_what_was_generated(drawn: Path) -> None:
    record = read_metrics(drawn)[0]
    assert record["generation/tokens_per_second"] > 0
    assert 1 <= record["completions/mean_length"] <= DRAWN["max_completion_length"]
    names = {"reward", "reward_std", "frac_reward_zero_std", "rewards/last-number/mean", "rewards/pattern/mean", "kl"}
    names |= {"completions/clipped_ratio", "entropy", "clip_ratio/region_mean"}
    assert names <= record.keys()
    assert 0 < record["reward"] < 1.5 and record["reward_std"] > 0, "so that there is something to learn"
    assert {f"eval_{name}" for name in names} <= read_evaluations(drawn)[-1].keys()


def test_the_run_records_its_rewards(drawn: Path) -> None:
    components = json.loads((drawn / "provenance.json").read_text())["components"]
    for label in ("task grpo", "reward last-number", "reward pattern"):
        assert components[label]["distribution"] == "panda-rl"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": ("lenght", "pattern")}, "unknown reward 'lenght'. Did you mean 'length'?"),
        ({"reward": ("length", "pattern"), "length_target": 9}, "9 tokens are more than max_completion_length, 4"),
        ({"max_completion_length": 16}, "leaves no room for a prompt"),
        ({"reward_weights": "1"}, "it has 1, and `reward` has 2: last-number, pattern"),
    ],
)
def test_mistakes_are_explained(options: dict[str, Any], message: str, train: Train, tmp_path: Path) -> None:
    printed = train(tmp_path / "run", fails=True, **DRAWN | options)
    assert message in printed and "Traceback" not in printed
