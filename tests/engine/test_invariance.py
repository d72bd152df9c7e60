"""One trajectory, however a step is split: micro batches, ranks, packed rows, ZeRO stages.

The reference is a plain loop over plain transformers, written here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from initial_model import initial_model
from launching import exported_weights
from launching import losses
from launching import metrics
from launching import train_many
from launching import zero3_ahead
from launching import zero3_at_once
from transformers import LlamaConfig

from panda.data.order import SampleOrder
from panda.data.order import Source

SAMPLES, STEP_SAMPLES, SEED = 43, 8, 7  # five full steps and one of three samples
RATE, CLIP, BETAS, EPSILON, DECAY = 1e-3, 0.5, (0.9, 0.99), 1e-4, 0.1
SPLITS = {"2x4": (2, 4, 1), "8x1": (8, 1, 1), "1x8": (1, 8, 1), "4x1x2": (4, 1, 2), "2x2x2": (2, 2, 2)}
"""Micro batch, accumulation, ranks."""
LAID_OUT = {f"{batching} {name}": (batching, name) for batching in ("grouped", "packed") for name in ("2x4", "2x2x2")}
"""How samples become rows, on one rank and on two."""


def rows() -> list[dict[str, str]]:
    """Ragged lengths and uneven masks: a mean of means is far from the mean."""
    generator = random.Random(1)
    letters = "abcdefghij "
    return [
        {
            "input": "".join(generator.choices(letters, k=generator.randint(1, 30))),
            "target": "".join(generator.choices(letters, k=generator.choice([1, 2, 3, 25, 40]))),
        }
        for _ in range(SAMPLES)
    ]


def arguments(data: Path, output: Path, split: tuple[int, int, int], *more: object, workers: int = 0) -> list[object]:
    micro, accumulation, _ = split
    return [
        *("--arch", "llama-tiny", "--num_layers", 2, "--hidden_size", 32, "--intermediate_size", 48),
        *("--num_heads", 2, "--instruction_tuning_data_dir", data, "--output_dir", output, "--seed", SEED),
        *("--per_gpu_train_batch_size", micro, "--gradient_accumulation_steps", accumulation, "--num_workers", workers),
        *("--learning_rate", RATE, "--max_grad_norm", CLIP, "--adam_betas", ",".join(map(str, BETAS))),
        *("--adam_epsilon", EPSILON, "--weight_decay", DECAY, "--warmup_steps", 2, "-p", "no:tensorboard"),
        *more,
    ]


Reference = tuple[list[dict[str, float]], dict[str, torch.Tensor]]


def warmup(completed: int) -> float:
    return min(1.0, (completed + 1) / 2)


def plain_loop(*, mean_of_means: bool = False, schedule: Callable[[int], float] = warmup) -> Reference:
    """The same training without panda's engine, tasks or optimizer: a record of each step, and the weights."""
    model = initial_model(
        LlamaConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            pad_token_id=0,
        ),
        SEED,
    ).double()
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    data = rows()
    order = SampleOrder([Source(SAMPLES, SAMPLES)], SEED)
    history = []
    tokens = supervised = 0
    for step, start in enumerate(range(0, SAMPLES, STEP_SAMPLES)):
        chosen = [data[sample] for sample in order.samples(range(start, min(start + STEP_SAMPLES, SAMPLES)))]
        sums, counts = [], []
        for row in chosen:
            prompt = [1, *(byte + 3 for byte in (row["input"] + "\n").encode())]
            answer = [*(byte + 3 for byte in row["target"].encode()), 2]
            ids = torch.tensor([prompt + answer])
            log_probabilities = model(ids).logits[0].log_softmax(-1)
            predictors = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
            sums.append(-log_probabilities[predictors, torch.tensor(answer)].sum())
            counts.append(len(answer))
        loss = sum(sums) / sum(counts)
        if mean_of_means:
            loss = sum(s / c for s, c in zip(sums, counts, strict=True)) / len(sums)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = RATE * schedule(step)
        optimizer.step()
        tokens += sum(len(row["input"] + row["target"]) + 3 for row in chosen)
        supervised += sum(counts)
        history.append(
            {
                "step": step + 1,
                "loss": loss.item(),
                "learning_rate": RATE * schedule(step),
                "grad_norm": norm.item(),
                "tokens": tokens,
                "supervised_tokens": supervised,
                "skipped_steps": 0,
            }
        )
    return history, {name: weight.detach() for name, weight in model.state_dict().items()}


def difference(run: Path, reference: Reference) -> tuple[float, float]:
    """Largest relative difference of a loss, and largest absolute difference of a weight."""
    records, weights = reference
    history = [record["loss"] for record in records]
    trained = exported_weights(run)
    assert len(losses(run)) == len(history) and trained.keys() == weights.keys()
    loss = max(abs(a - b) / abs(b) for a, b in zip(losses(run), history, strict=True))
    weight = max(float((trained[name].double() - weights[name]).abs().max()) for name in weights)
    return loss, weight


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.json"
    file.write_text(json.dumps(rows()))
    return file


@pytest.fixture(scope="module")
def reference() -> tuple[list[float], dict[str, torch.Tensor]]:
    return plain_loop()


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each split, and of each layout and each ZeRO stage on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    alone = [arguments(data, folder / name, split) for name, split in SPLITS.items() if split[2] == 1]
    together = [arguments(data, folder / name, split) for name, split in SPLITS.items() if split[2] == 2]
    together += [arguments(data, folder / f"zero{stage}", SPLITS["2x2x2"], "--zero_stage", stage) for stage in (1, 2)]
    together.append(arguments(data, folder / "zero3", SPLITS["2x2x2"], *zero3_at_once(folder)))
    together.append(arguments(data, folder / "zero3 ahead", SPLITS["2x2x2"], *zero3_ahead(folder)))
    alone.append(arguments(data, folder / "zero3 ahead alone", SPLITS["2x4"], *zero3_ahead(folder)))
    linear = ("--lr_scheduler", "linear", "--logging_steps", 4)
    alone.append(arguments(data, folder / "logged", SPLITS["1x8"], *linear))
    for label, (batching, name) in LAID_OUT.items():
        split = SPLITS[name]
        # 96 tokens hold three samples or more, and the longest has 74.
        more = ("--batching", batching, "--max_seq_length", 96)
        (together if split[2] == 2 else alone).append(arguments(data, folder / label, split, *more, workers=3))
    train_many(alone, cwd=folder)
    train_many(together, ranks=2, cwd=folder)
    return folder


@pytest.mark.parametrize("name", [*SPLITS, *LAID_OUT, "zero1", "zero2", "zero3", "zero3 ahead", "zero3 ahead alone"])
def test_every_split_follows_the_plain_loop(
    runs: Path, name: str, reference: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    loss, weight = difference(runs / name, reference)
    assert loss < 1e-6
    assert weight < 1e-6


def test_a_mean_of_means_does_not(runs: Path) -> None:
    loss, weight = difference(runs / "1x8", plain_loop(mean_of_means=True))
    assert loss > 1e-3
    assert weight > 1e-4


def test_tokens_are_counted_over_all_ranks(runs: Path) -> None:
    counts = [
        json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[-1])["supervised_tokens"]
        for name in ("8x1", "4x1x2", "zero3")
    ]
    assert counts == [sum(len(row["target"]) + 1 for row in rows())] * 3


def test_every_number_of_a_record_is_that_of_the_plain_loop(runs: Path) -> None:
    """Also where not every step is logged, and the last one is."""
    records, _ = plain_loop(
        schedule=lambda completed: (completed + 1) / 2 if completed < 2 else 1 - (completed - 2) / 4
    )
    logged = metrics(runs / "logged")
    assert [record["step"] for record in logged] == [4, 6]
    before = {"step": 0, "tokens": 0}
    for record in logged:
        expected = records[record["step"] - 1]
        assert {key: record[key] for key in expected} == pytest.approx(expected, rel=1e-6)
        seconds = record["step_seconds"] * (record["step"] - before["step"])
        assert record["tokens_per_second"] * seconds == pytest.approx(record["tokens"] - before["tokens"], rel=1e-3)
        before = record
