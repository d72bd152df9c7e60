"""Whatever is trained however, a run that is continued, once or twice, ends with the bits of one without a break.

`PANDA_EVERY_WAY=1` tries all layouts, optimizers and kinds of training; otherwise some.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from launching import EVERY_WAY
from launching import ZERO3_AT_ONCE
from launching import assert_same_end
from same_bits import different

from panda.testing.runs import Outcome
from panda.testing.runs import train_each

RUN: tuple[object, ...] = (
    *("--arch", "llama-tiny", "--num_layers", 1, "--hidden_size", 32, "--intermediate_size", 48, "--num_heads", 2),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 48, "--num_workers", 0),
    *("--max_samples", 12, "--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine", "--warmup_steps", 2),
    *("--max_steps", 6, "--save_steps", 1, "--weight_decay", 0.1, "--prompts", "a", "--learning_rate", 0.003),
)
RANKS = 2
"""So a step has 4 samples, and an epoch 3 steps."""
LAYOUTS = ("0", "1", "2", "3", "offload")
OPTIMIZERS = ("adamw", "nvlamb")
KINDS: dict[str, tuple[object, ...]] = {
    "full": (),
    "lora": ("--use_lora", "--lora_r", 4),
    "nf4": ("--use_quant", "--lora_r", 4),
}
SOME = (("3", "adamw", "lora"), ("offload", "nvlamb", "full"), ("2", "adamw", "nf4"))
WAYS = tuple(itertools.product(LAYOUTS, OPTIMIZERS, KINDS)) if EVERY_WAY else SOME
MIDDLE, EPOCH, LATER = 2, 3, 4
FROM = {"middle": ("whole", MIDDLE), "epoch": ("whole", EPOCH), "twice": ("middle", LATER)}
"""By name, the run and the step whose checkpoint each continues."""


def flags(folder: Path, way: tuple[str, str, str]) -> list[object]:
    layout, optimizer, kind = way
    if layout != "offload" and layout != "3":
        return [*RUN, "--zero_stage", layout, "--optimizer", optimizer, *KINDS[kind]]
    zero = ZERO3_AT_ONCE if layout == "3" else {"offload_optimizer": {"device": "cpu"}}
    (folder / f"{layout}.json").write_text(json.dumps({"zero_optimization": zero}))
    stage = ("--zero_stage", 3 if layout == "3" else 2, "--deepspeed_config", folder / f"{layout}.json")
    return [*RUN, *stage, "--optimizer", optimizer, *KINDS[kind]]


def place(folder: Path, way: tuple[str, str, str], name: str) -> Path:
    return folder / f"{'-'.join(way)}-{name}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str, str], list[Outcome]]]:
    """The folder of the runs of each way, and how they ended: without a break, and continued."""
    folder = tmp_path_factory.mktemp("matrix")
    runs = []
    for way in WAYS:
        runs.append([*flags(folder, way), "--output_dir", place(folder, way, "whole")])
        for name, (before, step) in FROM.items():
            checkpoint = place(folder, way, before) / f"checkpoints/step-{step:08d}"
            runs.append([*flags(folder, way), "--output_dir", place(folder, way, name), "--resume", checkpoint])
    outcomes = train_each(runs, ranks=RANKS, cwd=folder)
    each = 1 + len(FROM)
    return folder, {way: outcomes[each * number : each * (number + 1)] for number, way in enumerate(WAYS)}


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_a_continued_run_ends_with_the_same_bits(
    trained: tuple[Path, dict[tuple[str, str, str], list[Outcome]]], way: tuple[str, str, str]
) -> None:
    folder, outcomes = trained
    assert outcomes[way] == [Outcome()] * len(outcomes[way])
    whole = place(folder, way, "whole")
    for name, (_, step) in FROM.items():
        assert_same_end(place(folder, way, name), whole, after=step)
        last = "checkpoints/step-00000006"  # with the optimizer
        assert different(place(folder, way, name) / last, whole / last) is None, name
