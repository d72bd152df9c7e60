"""Runs that rehearse their longest micro batch, as on a GPU, take the course of runs that do not, to the bit."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from launching import BIN
from launching import EVERY_WAY
from launching import assert_same_end
from launching import metrics
from launching import start
from launching import train_many
from launching import zero3_at_once
from same_bits import different

PLUGIN = '''
import torch
from dataclasses import dataclass
from panda.registry import hookimpl, register_plugin
from panda.run import rehearsal

@dataclass(frozen=True)
class RehearsingOptions:
    """Options of the test."""
    rehearses: bool = True
    """Whether runs on a CPU do, too."""
    most_tokens: int = 1_000_000
    """Of a row for which there is memory."""
    least_tokens: int = 0
    """Of a row that has gradients."""

@register_plugin("rehearsing", options=RehearsingOptions)
class Rehearsing:
    """Has runs rehearse."""
    acts = False

    def __init__(self, options, context):
        self.options = options

    @hookimpl
    def panda_run_start(self, run):
        rehearsal.DEVICES = ("cpu", "cuda") if self.options.rehearses else ()
        rehearsal.SAID_AFTER = 0.0
        loss = run.task.loss

        def limited(model, batch, *more):
            tokens = batch.input_ids.shape[1]
            if tokens > self.options.most_tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return loss(model, batch, *more) * (tokens >= self.options.least_tokens)

        run.task.loss = limited
'''
RUN: tuple[object, ...] = (
    *("--arch", "llama-tiny", "--num_layers", 1, "--hidden_size", 32, "--intermediate_size", 48, "--num_heads", 2),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--num_workers", 0, "--max_steps", 4),
    *("--gradient_accumulation_steps", 2, "--save_steps", 2, "--learning_rate", 0.003),
    *("--logging_steps", 1, "--seed", 5, "--plugins", "./rehearsing.py:rehearsing"),
)
KINDS: dict[str, tuple[object, ...]] = {"full": (), "lora": ("--use_lora", "--lora_r", 4, "--lora_dropout", 0.3)}
SOME = ((0, "full"), (1, "lora"), (2, "full"), (3, "lora"))
WAYS = tuple(itertools.product(range(4), KINDS)) if EVERY_WAY else SOME
SAID = re.compile(r"rehearsed the longest micro batch \(1 x (\d+) tokens\): (?:[\d.]+ GiB, )?\d+\.\d s")


def flags(folder: Path, stage: int, kind: str, longest: int = 200) -> list[object]:
    (folder / "rehearsing.py").write_text(PLUGIN)
    return [
        *RUN,
        "--max_seq_length",
        longest,
        *KINDS[kind],
        *(zero3_at_once(folder) if stage == 3 else ["--zero_stage", stage]),
    ]


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the runs of each way, with a rehearsal, without, and continued with one; what they printed."""
    folder, runs = tmp_path_factory.mktemp("runs"), []
    for stage, kind in WAYS:
        of_way, place = flags(folder, stage, kind), folder / f"{stage}-{kind}"
        runs.append([*of_way, "--output_dir", f"{place}-without", "--rehearses", "false"])
        runs.append([*of_way, "--output_dir", f"{place}-with"])
        checkpoint = f"{place}-without/checkpoints/step-00000002"
        runs.append([*of_way, "--output_dir", f"{place}-continued", "--resume", checkpoint])
    return folder, train_many(runs, ranks=request.param, cwd=folder)


@pytest.mark.parametrize(("stage", "kind"), WAYS)
def test_a_run_with_a_rehearsal_is_that_without(trained: tuple[Path, str], stage: int, kind: str) -> None:
    folder, printed = trained
    with_it, without, continued = (folder / f"{stage}-{kind}-{name}" for name in ("with", "without", "continued"))
    assert len(SAID.findall(printed)) == 2 * len(WAYS)  # so all that should have did
    times = {"tokens_per_second": 0, "step_seconds": 0, "data_wait": 0, "seconds": 0, "save_seconds": 0}
    times |= {"memory_gib": 0}  # on a GPU its allocator has more to choose from
    assert [record | times for record in metrics(with_it)] == [record | times for record in metrics(without)]
    for step in (2, 4):
        checkpoint = f"checkpoints/step-{step:08d}"  # with the optimizer, random numbers and counters
        assert different(with_it / checkpoint, without / checkpoint) is None
    assert_same_end(continued, without, after=2)
    assert different(continued / checkpoint, without / checkpoint) is None


def test_lack_of_memory_is_found_before_the_first_step(tmp_path: Path) -> None:
    argv = [*flags(tmp_path, 0, "full"), "--output_dir", tmp_path / "run", "--most_tokens", 41]
    with start(BIN / "panda-train", *argv, cwd=tmp_path) as started:
        done = started.wait()
    printed = done.stdout + done.stderr
    assert done.returncode != 0
    said = re.search(
        r"This was the rehearsal of the longest micro batch \(1 x (\d+) tokens\), which comes in step (\d), before"
        r" step 1\.\n.*The GPU is out of memory",
        printed,
    )
    assert said and said.groups() == ("42", "4"), printed
    assert not (tmp_path / "run/metrics.jsonl").exists() or not metrics(tmp_path / "run")


def test_nothing_is_said_where_the_first_step_has_the_longest(tmp_path: Path) -> None:
    argv = [*flags(tmp_path, 0, "full", 16), "--output_dir", tmp_path / "run"]
    assert "rehears" not in train_many([argv], cwd=tmp_path)


def test_a_weight_that_is_reached_in_the_rehearsal_only_is_named(tmp_path: Path) -> None:
    argv = [*flags(tmp_path, 0, "full"), "--output_dir", tmp_path / "run", "--least_tokens", 42]
    printed = train_many([argv], cwd=tmp_path)
    assert SAID.findall(printed) == ["42"]  # which comes after the steps that are looked at
    assert "had no gradient in the first 3 steps" in printed
