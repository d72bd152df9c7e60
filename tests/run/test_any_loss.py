"""Losses that are not next-token prediction: pairs, statistics of a step, a new head, answers made in the loop.

One trajectory however a step is split, and the same bits after a resume. The tasks are those of toy_tasks.py.
"""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import EVERY_WAY
from launching import exported_weights
from launching import metrics
from launching import run_panda
from launching import train_many
from launching import zero3_at_once
from safetensors.torch import load_file
from toy_tasks import toy_tasks

SAMPLES, HELD_OUT, STEPS = 17, 9, 3
"""Two full steps of 8 and one of 1, in which one of two ranks has nothing."""
TASKS = ("toy-pairs", "toy-statistics", "toy-online", "toy-head")
ADAPTED = ("toy-pairs", "toy-head", "toy-online")
ADAPTERS = ("--use_lora", "--lora_r", 4, "--lora_dropout", 0)
SPLITS = {"8x1": (8, 1), "2x4": (2, 4), "1x8": (1, 8)}
TOGETHER = {"4x1": (4, 1), "2x2": (2, 2), "zero1": (2, 2), "zero2": (2, 2), "zero3": (2, 2)}
"""Micro batch and accumulation, on one rank and on two."""
TRIED = [
    (task, name)
    for task in TASKS
    for name in (*SPLITS, *TOGETHER)
    if EVERY_WAY or task == "toy-statistics" or name not in ("4x1", "zero1", "zero2")
]
"""Which task is tried in which way: ZeRO 1 and 2 leave weights whole, so that tasks do not differ under them."""


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    generator = random.Random(seed)

    def text(most: int) -> str:
        return "".join(generator.choices("abcdefghij", k=generator.randint(1, most)))

    return [
        {"prompt": text(20), "chosen": text(12), "rejected": text(12), "weight": [1.0, 0.5, 2.0][number % 3]}
        for number in range(count)
    ]


def arguments(task: str, name: str, split: tuple[int, int], *more: object) -> list[object]:
    return [
        *("--task", task, "--arch", "llama-tiny", "--num_layers", 2, "--hidden_size", 32, "--intermediate_size", 48),
        *("--num_heads", 2, "--initializer_range", 0.2, "--max_seq_length", 64, "--num_workers", 0),
        *("--pairs_dir", "pairs.json", "--eval_data_dir", "held_out.json", "--eval_steps", 2, "--output_dir", name),
        *("--per_gpu_train_batch_size", split[0], "--gradient_accumulation_steps", split[1]),
        *("--learning_rate", 1e-3, "--adam_epsilon", 1e-4, "--lr_scheduler", "constant", "--weight_decay", 1, *more),
    ]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return toy_tasks(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "pairs.json").write_text(json.dumps(rows(SAMPLES, seed=1)))
    (folder / "held_out.json").write_text(json.dumps(rows(HELD_OUT, seed=2)))
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path, environment: dict[str, str]) -> Path:
    """A run of each task in each split, and in each ZeRO stage on two ranks."""
    at_once = zero3_at_once(folder)
    stages = {"zero1": ["--zero_stage", 1], "zero2": ["--zero_stage", 2], "zero3": at_once}
    alone = [arguments(task, f"{task} {name}", split) for task in TASKS for name, split in SPLITS.items()]
    alone += [arguments(task, f"{task} saving", SPLITS["2x4"], "--save_steps", 2) for task in TASKS]
    alone += [arguments(task, f"{task} adapters", SPLITS["2x4"], *ADAPTERS, "--save_steps", 2) for task in ADAPTED]
    train_many(alone, cwd=folder, **environment)
    train_many(
        [
            arguments(task, f"{task} {name}", split, *stages.get(name, []))
            for task in TASKS
            for name, split in TOGETHER.items()
            if (task, name) in TRIED
        ]
        + [arguments(task, f"{task} adapters zero3", TOGETHER["2x2"], *ADAPTERS, *at_once) for task in ADAPTED],
        ranks=2,
        cwd=folder,
        **environment,
    )
    return folder


def numbers(run: Path) -> list[dict[str, float]]:
    """The records of a run without what depends on its speed."""
    timed = {"tokens_per_second", "step_seconds", "data_wait", "eval_seconds", "save_seconds", "resume_seconds"}
    return [{key: value for key, value in record.items() if key not in timed} for record in metrics(run)]


@pytest.mark.parametrize(("task", "name"), TRIED)
def test_every_split_takes_the_same_steps(runs: Path, task: str, name: str) -> None:
    found, expected = numbers(runs / f"{task} {name}"), numbers(runs / f"{task} 8x1")
    assert len(found) == len(expected) == STEPS + 2
    for record, reference in zip(found, expected, strict=True):
        assert record == pytest.approx(reference, rel=1e-5, abs=1e-5)
        for key in {"loss", "eval_loss"} & reference.keys():
            assert record[key] == pytest.approx(reference[key], rel=1e-6, abs=1e-6)
    trained, reference_weights = (exported_weights(runs / f"{task} {each}") for each in (name, "8x1"))
    assert trained.keys() == reference_weights.keys()
    assert max(float((trained[key] - reference_weights[key]).abs().max()) for key in trained) < 1e-6


def test_a_loss_of_pairs_begins_at_that_of_equal_ones_and_counts_them_with_their_weights(runs: Path) -> None:
    first, evaluated, *_ = sorted(numbers(runs / "toy-pairs 8x1"), key=lambda record: record["step"])[:3]
    del evaluated
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert abs(numbers(runs / "toy-pairs 8x1")[-1]["eval_margin"]) > 1e-3, "the reference learns, too"
    last = numbers(runs / "toy-pairs 8x1")[-2]
    assert last["pairs"] == sum(row["weight"] for row in rows(SAMPLES, seed=1))
    assert "supervised_tokens" not in last


@pytest.mark.parametrize("task", TASKS)
def test_a_resumed_run_takes_the_same_steps_to_the_bit(
    runs: Path, environment: dict[str, str], task: str, tmp_path: Path
) -> None:
    whole = runs / f"{task} saving"
    more = ("--resume", whole / "checkpoints" / "step-00000002")
    name = tmp_path / "resumed"
    train_many([arguments(task, str(name), SPLITS["2x4"], *more)], cwd=runs, **environment)
    assert numbers(name) == [record for record in numbers(whole) if record["step"] > 2]
    found, expected = exported_weights(name), exported_weights(whole)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("task", ADAPTED)
def test_adapters_take_the_same_steps_on_a_partitioned_base(
    runs: Path, environment: dict[str, str], task: str, tmp_path: Path
) -> None:
    """With their base as the reference, and with a head that is trained whole."""
    whole = runs / f"{task} adapters"
    for record, reference in zip(numbers(runs / f"{task} adapters zero3"), numbers(whole), strict=True):
        assert record == pytest.approx(reference, rel=1e-5, abs=1e-5)
    more = ("--resume", whole / "checkpoints" / "step-00000002")
    train_many([arguments(task, str(tmp_path / "resumed"), SPLITS["2x4"], *ADAPTERS, *more)], cwd=runs, **environment)
    assert numbers(tmp_path / "resumed") == [record for record in numbers(whole) if record["step"] > 2]
    adapters = load_file(whole / "export" / "adapter_model.safetensors")
    assert ("base_model.model.score.weight" in adapters) == (task == "toy-head")
    if task == "toy-pairs":
        assert numbers(whole)[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
        assert abs(numbers(whole)[-1]["eval_margin"]) > 1e-5, "the reference learns, too"


@pytest.mark.parametrize("task", ["toy-pairs", "toy-unstated"])
@pytest.mark.parametrize("command", ["panda-train", "check"])
def test_a_loss_that_does_not_say_that_it_is_right_packed_is_refused_packed(
    folder: Path, environment: dict[str, str], command: str, task: str
) -> None:
    given = arguments(task, "packed", SPLITS["2x4"], "--batching", "packed")
    if command == "check":
        done = run_panda("panda", "check", *given, cwd=folder, **environment)
    else:
        done = run_panda("panda-train", *given, cwd=folder, **environment)
    is_refused = "batching: packed with a task that does not say that it is right packed" in done.stderr
    assert is_refused == (task == "toy-pairs"), done.stderr


def test_the_guides_task_trains(folder: Path, tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
    [source] = [
        block for block in re.findall("```python\n(.*?)```", guide, re.DOTALL) if '@register_task("pairs"' in block
    ]
    (tmp_path / "guide_pairs.py").write_text(source)
    info = tmp_path / "guide_pairs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guide-pairs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[panda.tasks]\npairs = guide_pairs\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    train_many([arguments("pairs", str(tmp_path / "run"), SPLITS["2x4"])], cwd=folder, PYTHONPATH=path)
    first, *_, last = (record for record in numbers(tmp_path / "run") if "loss" in record)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6) and "accuracy" in first
    assert last["pairs"] == SAMPLES


def test_a_pair_that_is_too_long_is_cut_and_counted(folder: Path, environment: dict[str, str]) -> None:
    pair = {"prompt": "a" * 20, "chosen": "b" * 50, "rejected": "c"}
    (folder / "long.json").write_text(json.dumps([pair, {**pair, "chosen": "b"}]))
    given = ["--task", "toy-pairs", "--arch", "llama-tiny", "--max_seq_length", 40, "--pairs_dir", "long.json"]
    (folder / "long.yaml").write_text("{}")
    done = run_panda("panda", "data", "long.yaml", *given, cwd=folder, **environment)
    assert "1 of 2 samples (50.0%) is cut to 40 tokens (max_seq_length)" in done.stdout, done.stderr
    assert "[chosen] " in done.stdout and f"»{'b' * 39}" in done.stdout and "[rejected] " in done.stdout
