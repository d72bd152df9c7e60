"""The guard in runs on two ranks: a spoilt row on one of them, in each precision and sharding; and what names it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributions import installed_for_runs
from launching import EVERY_WAY
from launching import assert_same_end
from launching import exported_weights
from launching import losses
from launching import metrics
from launching import run_panda
from launching import train_many
from safetensors.torch import load_file

from panda.data.order import SampleOrder
from panda.data.order import Source
from panda.hooks.guard import FEWEST
from panda.hooks.guard import GuardOptions
from panda.hooks.guard import SpikeGuard
from panda.hooks.guard import guard
from panda.hooks.guard import spike
from panda.registry.contexts import PluginContext
from panda.run.replaying import Part
from panda.run.replaying import Replayed

SPOILING = """
from panda.tasks.instruct import Instruct
from panda.tasks.instruct import InstructOptions

@dataclass(frozen=True)
class SpoilingOptions(InstructOptions):
    spoilt: str = ""

@register_task("spoiling", options=SpoilingOptions)
class Spoiling(Instruct):
    '''Instruct, with another loss for a row that says so.'''

    layouts = ("padded",)

    def loss(self, model, batch, statistics=None):
        found = super().loss(model, batch)
        if any("spoilt" in self.tokenizer.decode(row) for row in batch.input_ids):
            found = {"nan": found * float("nan"), "inf": found + float("inf"), "spike": found * 1000}.get(
                self.options.spoilt, found
            )
        return found
"""
LEAVING_OUT = """
@dataclass(frozen=True)
class LeavingOutOptions:
    step_to_leave: int = 0

@register_plugin("leaving-out", options=LeavingOutOptions)
class LeavingOut:
    def __init__(self, options, context):
        self.options = options

    @hookimpl
    def panda_step_start(self, run, step):
        if step == self.options.step_to_leave:
            run.skip_step("to see what a run without it does")
"""
ROWS, STEPS, BAD, SEED = 56, 26, 22, 42
AT_A_STEP = 2
KINDS: dict[str, list[object]] = {
    "nan": ["--spoilt", "nan"],
    "inf": ["--spoilt", "inf"],
    "spike": ["--spoilt", "spike", "--guard_spike", 50],
}
RUN: tuple[object, ...] = (
    *("--arch", "llama-tiny", "--num_layers", 1, "--hidden_size", 16, "--intermediate_size", 24, "--num_heads", 2),
    *("--instruction_tuning_data_dir", "rows.json", "--max_seq_length", 48, "--num_workers", 0, "--task", "spoiling"),
    *("--gradient_accumulation_steps", 1, "--per_gpu_train_batch_size", 1, "--prompts", "a", "--seed", SEED),
    *("--max_steps", STEPS, "--lr_scheduler", "linear", "--warmup_steps", 2, "--logging_steps", 1, "--save_steps", 20),
)
WAYS = {"bf16-2": ("bf16", 2, ""), "fp32-3-offload": ("fp32", 3, "offload")}
TRIED = {("bf16-2", "nan"), ("bf16-2", "spike"), ("fp32-3-offload", "inf")}
if EVERY_WAY:
    WAYS = {
        f"{precision}-{stage}{'-' * bool(offload)}{offload}": (precision, stage, offload)
        for precision in ("fp32", "bf16")
        for stage in range(4)
        for offload in ("", "offload")
        if stage or not offload
    }
    TRIED = {(way, kind) for way in WAYS for kind in KINDS}
RESUMED = "bf16-2-spike"


def spoilt_row() -> int:
    """The row, counted from 1, that the second rank has in step BAD."""
    positions = range((BAD - 1) * AT_A_STEP, BAD * AT_A_STEP)
    return int(SampleOrder([Source(ROWS, ROWS)], SEED).samples(positions)[1]) + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    rows = [{"input": f"say {number}", "target": f"number {number}"} for number in range(ROWS)]
    rows[spoilt_row() - 1]["input"] = "spoilt"
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def environment(folder: Path) -> dict[str, str]:
    offers = {"tasks": {"spoiling": "spoiling"}, "plugins": {"leaving-out": "leaving_out"}}
    return installed_for_runs(folder / "site", "spoilt", offers, {"spoiling": SPOILING, "leaving_out": LEAVING_OUT})


@pytest.fixture(scope="module")
def printed(folder: Path, environment: dict[str, str]) -> str:
    """What the runs print: of each way one with a spoilt row of each kind, and one that leaves its step out."""
    file = folder / "offload.json"
    file.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}))
    configurations: list[list[object]] = []
    for name, (precision, stage, offload) in WAYS.items():
        way = [
            *RUN,
            "--precision",
            precision,
            "--zero_stage",
            stage,
            *(["--deepspeed_config", file] if offload else []),
        ]
        for kind in (kind for kind in KINDS if (name, kind) in TRIED):
            configurations.append([*way, *KINDS[kind], "--output_dir", folder / f"{name}-{kind}"])
        left_out = ["--plugins", "leaving-out", "--step_to_leave", BAD]
        configurations.append([*way, *left_out, "--output_dir", folder / f"{name}-without"])
    resumed = next(each for each in configurations if each[-1] == folder / RESUMED)
    checkpoint = folder / RESUMED / "checkpoints/step-00000020"
    configurations.append([*resumed[:-1], folder / "resumed", "--resume", checkpoint])
    return train_many(configurations, ranks=2, cwd=folder, **environment)


def skipped(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("way", "kind"), sorted(TRIED))
def test_a_spoilt_step_is_skipped_and_named_and_the_run_is_that_without_it(
    folder: Path, printed: str, way: str, kind: str
) -> None:
    run, without = folder / f"{way}-{kind}", folder / f"{way}-without"
    found, expected = losses(run), losses(without)
    assert found[: BAD - 1] + found[BAD:] == expected and len(found) == STEPS
    assert [record["skipped_steps"] for record in metrics(run)] == [0] * (BAD - 1) + [1] * (STEPS - BAD + 1)
    trained, others = exported_weights(run), exported_weights(without)
    assert all(torch.equal(trained[name], others[name]) for name in others)
    (record,) = skipped(run)
    assert record["step"] == BAD and [each["rank"] for each in record["samples"]] == [0, 1]
    assert record["samples"][1]["row"] == f"{folder / 'rows.json'}:{spoilt_row()}"
    whys = {"nan": "its loss is NaN", "inf": "its loss is infinite", "spike": "its loss of "}
    assert record["why"].startswith(whys[kind])
    assert f"step {BAD} is skipped: {record['why']}. Its rows: " in printed
    assert f"1 of {STEPS} steps was skipped: {BAD} ({run}/skipped.jsonl)" in printed
    assert not (without / "skipped.jsonl").exists()


def test_what_is_usual_is_part_of_a_checkpoint(folder: Path, printed: str) -> None:
    assert skipped(folder / "resumed")[0]["why"] == skipped(folder / RESUMED)[0]["why"]
    assert_same_end(folder / "resumed", folder / RESUMED, after=20)


def test_replay_names_the_row_and_writes_nothing(folder: Path, printed: str, environment: dict[str, str]) -> None:
    run = folder / "bf16-2-nan"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = run_panda("panda", "replay", run, BAD, cwd=folder, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"on the weights after step {BAD - 1}, from step-00000020" in done.stdout
    assert done.stdout.endswith(f"\nresponsible: rows.json:{spoilt_row()}, which is not finite.\n")
    spoilt, other = (line.split() for line in done.stdout.splitlines() if "  rows.json:" in line)
    assert spoilt[0] == "nan" and float(other[0]) > 0 and float(other[1]) > 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    usual = run_panda("panda", "replay", run, 21, cwd=folder, **environment)
    loss = f"loss {losses(run)[20]:.4g}, "
    assert usual.stdout.count(loss) == 2 and "none stands out" in usual.stdout


def test_replay_says_what_it_needs(folder: Path, printed: str, environment: dict[str, str]) -> None:
    run = folder / "bf16-2-nan"
    for words, message in (
        ((run, STEPS + 1), f"STEP: the run has {STEPS} steps, and no step {STEPS + 1}"),
        ((folder, 1), "expected a run directory, with the config.yaml of its run in it"),
        ((run, 0), "expected a run directory and the number of a step"),
        ((run,), "expected a run directory and the number of a step"),
    ):
        done = run_panda("panda", "replay", *words, cwd=folder, **environment)
        assert done.returncode == 2 and message in done.stderr, done.stderr


# -- without a run ----------------------------------------------------------------------------


@pytest.mark.parametrize(("norms", "found"), [((0.8, 23.1), 1), ((1, 1, 23, 24), 2), ((5, 9), 0), ((23,), 0)])
def test_what_is_far_above_the_others_is_responsible(norms: tuple[float, ...], found: int) -> None:
    parts = [Part("rows.json:1", "", 5, 1.0, norm) for norm in norms]
    assert Replayed(29, 1.0, 1.0, 5, "tokens", parts).responsible == parts[len(parts) - found :]


def test_what_counts_as_a_spike() -> None:
    usual = [5.0 + number % 5 / 10 for number in range(FEWEST)]  # median 5.2, deviation 0.148
    assert spike("loss", 6.6, usual, 10) is None
    assert spike("loss", 6.8, usual, 10) == "its loss of 6.8 is 11 deviations above the median of 5.2"
    assert spike("loss", -100, usual, 10) is None, "below is no spike"
    assert spike("loss", 1e9, usual[1:], 10) is None, "too few to judge by"
    assert spike("loss", 5.4, [5.0] * FEWEST, 10) is None and spike("loss", 5.6, [5.0] * FEWEST, 10)


def test_what_was_skipped_is_not_usual() -> None:
    found = guard(GuardOptions(guard_spike=10), PluginContext())
    assert isinstance(found, SpikeGuard) and not isinstance(guard(GuardOptions(), PluginContext()), SpikeGuard)
    asked: list[str] = []
    run = SimpleNamespace(skip_step=asked.append, grad_norm=1.0, left_out=None)
    for step in range(1, FEWEST + 11):
        value = 5.0 if step <= FEWEST else 50.0
        found.panda_gradients(run, torch.tensor(value), 1.0)  # type: ignore[arg-type]
        taken = len(asked) == max(0, step - FEWEST - 1)
        if taken or step <= FEWEST:
            found._taken() if step <= FEWEST else None
    assert len(asked) == 10 and list(found.usual["loss"]) == [5.0] * FEWEST
    again = SpikeGuard(GuardOptions(), 10)
    again.panda_load_state(run, json.loads(json.dumps(found.panda_save_state(run))))  # type: ignore[arg-type]
    assert again.usual == found.usual


def test_a_batch_is_saved_where_a_run_is_stopped(folder: Path, environment: dict[str, str]) -> None:
    """A loss that is always NaN; tests/run/test_diverged.py has which checkpoint is recommended."""
    run = folder / "stopped"
    flags = [*RUN, "--instruction_tuning_data_dir", "spoilt.json", "--spoilt", "nan", "--guard_patience", 2]
    (folder / "spoilt.json").write_text(json.dumps([{"input": "spoilt", "target": "a"}] * 4))
    at = flags.index("rows.json") - 1
    del flags[at : at + 2]
    done = run_panda("panda-train", *flags, "--output_dir", run, "-p", "no:plot", cwd=folder, **environment)
    assert done.returncode == 2 and "step 2: the last 2 steps were skipped" in done.stderr, done.stderr
    saved = load_file(run / "skipped-batches" / "step-00000002-rank-0.safetensors")
    assert saved["0.cells"].shape[:2] == (2, 1)
    assert "2 of 2 steps were skipped: 1, 2 (" in done.stdout and not (run / "export").exists()
