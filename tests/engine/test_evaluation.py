"""Evaluation: each sample once, however rows and ranks are laid out, and training goes on as if there were none.

The reference is plain transformers in float64, a sample at a time, over the weights that runs export.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import losses
from launching import metrics
from launching import train_many
from launching import zero3_at_once
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

STEPS, EVAL_STEPS = 6, 4
HELD_OUT = 65
"""Rows laid out together are 64 on two ranks: of the last one, one rank has nothing."""
EVALUATED = {
    "alone": [],
    "packed": ["--batching", "packed"],
    "large rows": ["--per_gpu_eval_batch_size", 33],
    "two ranks": [],
    "two ranks packed": ["--batching", "packed"],
    "zero3": [],
}
COMPARED = {
    "alone": [],
    "lora": ["--use_lora", "--lora_r", 4, "--lora_dropout", 0.3],
    "lora 4 bits": ["--use_quant", "--lora_r", 4],
    "lora 8 bits": ["--use_quant", "--quant_bits", 8, "--lora_r", 4],
    "zero3": [],
}
"""Trained with and without evaluations."""


def rows(count: int, seed: int) -> list[dict[str, str]]:
    generator = random.Random(seed)
    return [
        {
            "input": "".join(generator.choices("abcdefghij ", k=generator.randint(1, 30))),
            "target": "".join(generator.choices("abcdefghij ", k=generator.choice([1, 2, 3, 25, 40]))),
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rows.json").write_text(json.dumps(rows(24, seed=1)))
    (folder / "held_out.json").write_text(json.dumps(rows(HELD_OUT, seed=2)))
    at_once = zero3_at_once(folder)
    evaluating = ["--eval_data_dir", "held_out.json", "--eval_steps", EVAL_STEPS]

    def arguments(name: str, *more: object, steps: int = STEPS) -> list[object]:
        ranks = 2 if "two" in name or "zero3" in name else 1
        return [
            *("--arch", "llama-tiny", "--num_layers", 2, "--hidden_size", 32, "--intermediate_size", 48),
            *("--num_heads", 2, "--initializer_range", 0.2, "--max_seq_length", 96),
            *(
                "--num_workers",
                int("packed" in name),
                "--instruction_tuning_data_dir",
                "rows.json",
                "--output_dir",
                name,
                "--max_steps",
                steps,
            ),
            *("--per_gpu_train_batch_size", 2, "--gradient_accumulation_steps", 2 // ranks, "--warmup_steps", 2),
            *("--learning_rate", 1e-2, "-p", "no:plot", *(at_once if "zero3" in name else ()), *more),
        ]

    alone = [arguments("short", *evaluating, steps=EVAL_STEPS)]
    together = []
    for name, flags in EVALUATED.items():
        (alone if name in ("alone", "packed", "large rows") else together).append(arguments(name, *flags, *evaluating))
    for name, flags in COMPARED.items():
        several = together if name == "zero3" else alone
        several.append(arguments(f"{name} without", *flags))
        if name not in EVALUATED:
            several.append(arguments(name, *flags, *evaluating))
    train_many(alone, cwd=folder)
    end = folder / "zero3 without" / "checkpoints" / f"step-{STEPS:08}"
    together.append(arguments("zero3 at the end", "--resume", end, *evaluating))
    train_many(together, ranks=2, cwd=folder)
    return folder


def evaluations(run: Path) -> dict[int, dict[str, Any]]:
    """The records of a run's evaluations, by step."""
    return {record["step"]: record for record in metrics(run) if "eval_loss" in record}


def reference(run: Path) -> tuple[float, int, float]:
    """Over all held-out rows, of what ``run`` exported: the loss, how many tokens carry it, the mean of rows' means."""
    model = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float64)
    sums, counts = [], []
    for row in rows(HELD_OUT, seed=2):
        prompt = [1, *(byte + 3 for byte in (row["input"] + "\n").encode())]
        answer = [*(byte + 3 for byte in row["target"].encode()), 2]
        with torch.no_grad():
            log_probabilities = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        predictors = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        sums.append(-float(log_probabilities[predictors, torch.tensor(answer)].sum()))
        counts.append(len(answer))
    means = [s / c for s, c in zip(sums, counts, strict=True)]
    return sum(sums) / sum(counts), sum(counts), sum(means) / len(means)


@pytest.mark.parametrize("name", EVALUATED)
def test_the_loss_is_that_of_each_sample_once(runs: Path, name: str) -> None:
    loss, supervised_tokens, mean_of_means = reference(runs / name)
    found = evaluations(runs / name)
    assert list(found) == [EVAL_STEPS, STEPS]
    assert found[STEPS]["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert found[STEPS]["eval_loss"] != pytest.approx(mean_of_means, rel=1e-3)
    assert found[STEPS]["eval_supervised_tokens"] == supervised_tokens
    assert found[STEPS]["eval_tokens"] == sum(len(r["input"] + r["target"]) + 3 for r in rows(HELD_OUT, seed=2))


def test_one_on_the_way_is_of_the_weights_of_its_step(runs: Path) -> None:
    loss, _, _ = reference(runs / "short")
    assert list(evaluations(runs / "short")) == [EVAL_STEPS]  # once, though its last step is due as well
    for name in ("short", "alone", "packed", "two ranks"):
        assert evaluations(runs / name)[EVAL_STEPS]["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert evaluations(runs / "alone")[STEPS]["eval_loss"] != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("name", COMPARED)
def test_training_goes_on_to_the_same_bits(runs: Path, name: str) -> None:
    records = metrics(runs / name)
    assert len(records) == STEPS + 2
    assert [record["loss"] for record in records if "loss" in record] == losses(runs / f"{name} without")
    (file,) = (runs / name / "export").glob("*.safetensors")
    trained, plain = load_file(file), load_file(runs / f"{name} without" / "export" / file.name)
    assert trained.keys() == plain.keys()
    assert all(torch.equal(trained[key], plain[key]) for key in plain)


def test_a_run_that_has_nothing_left_to_train_is_evaluated_and_answers(runs: Path) -> None:
    """Under ZeRO-3 DeepSpeed expects modules in the order of the pass before, and none of these is a training step."""
    assert evaluations(runs / "zero3 at the end")[STEPS]["eval_loss"] == evaluations(runs / "zero3")[STEPS]["eval_loss"]
    assert (runs / "zero3 at the end" / "answers.json").exists()
