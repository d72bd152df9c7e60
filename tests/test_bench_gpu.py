"""bench/gpu measures what it says; on the CPU, at a size that says nothing about speed."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import start
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.gpu import measurement
from bench.gpu import text
from bench.gpu import trajectory
from bench.gpu.__main__ import obstacle
from bench.gpu.__main__ import one
from bench.gpu.cases import CASES
from bench.gpu.cases import SHAPES
from bench.gpu.cases import of_cards
from bench.gpu.cases import variant
from bench.gpu.checkpoint import tensors
from bench.gpu.measurement import Outcome
from bench.gpu.measurement import Settings
from bench.gpu.report import table

ROOT = Path(__file__).parents[1]
STEPS = 2


def bench(work: Path, *argv: object) -> tuple[str, int]:
    """What the command printed, and its exit code."""
    with start(ROOT / "bench" / "gpu", *argv, "--work", work, cwd=work) as started:
        done = started.wait()
    return done.stdout + done.stderr, done.returncode


def settings(work: Path, **given: Any) -> Settings:
    plain: dict[str, Any] = {
        "work": work,
        "panda": ROOT,
        "steps": STEPS,
        "timeout": 60.0,
        "deadline": None,
        "extra": (),
        "ends": True,
        "peer_more": {},
        "peak_tflops": 989.0,
        "data": {},
    }
    return Settings(**plain | given)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str, Path]:
    """The rows of a case with its peers and of a variant that panda refuses; what was printed; and the work folder."""
    work = tmp_path_factory.mktemp("bench")
    out = work / "rows.jsonl"
    printed, code = bench(work, "--cases", "tiny-lora,tiny-lora+lora_rr=2", "--steps", STEPS, "--out", out)
    assert code == 1, printed
    return [json.loads(line) for line in out.read_text().splitlines()], printed, work


def test_the_command_line_and_both_peers_are_measured(measured: tuple[list[dict[str, Any]], str, Path]) -> None:
    rows, printed, _ = measured
    assert [(row["case"], row["run"], row["status"]) for row in rows] == [
        ("tiny-lora", "panda", "ok"),
        ("tiny-lora", "hf", "ok"),
        ("tiny-lora", "hf-deepspeed", "ok"),
        ("tiny-lora+lora_rr=2", "panda", "failed, exit code 2"),
    ], printed
    for row in rows[:3]:
        assert row["steps"] == STEPS
        assert row["slots_per_second"] == row["tokens_per_second"]  # windows are full
        assert row["supervised_per_second"] == pytest.approx(row["tokens_per_second"] * 63 / 64)
        assert set(row["parts"]) == {"data", "forward", "backward", "optimizer", "rest"}
        assert min(row["parts"][part] for part in ("forward", "backward", "optimizer")) > 0
        assert row["to_first_step"] > 0 and row["after_last_step"] > 0
        assert row["step_seconds"]["min"] <= row["step_seconds"]["median"] <= row["step_seconds"]["max"]
    assert "panda.cli.train" in rows[0]["command"] and "bench.gpu.peer" in rows[1]["command"]
    assert rows[0]["versions"]["torch"] == torch.__version__ and rows[0]["panda"]["sources"]
    over = rows[0]["tokens_per_second"] / max(row["tokens_per_second"] for row in rows[1:3])
    assert f"| {over:.2f} |" in printed


def test_panda_and_its_peers_train_the_same_model_on_the_same_samples(
    measured: tuple[list[dict[str, Any]], str, Path],
) -> None:
    rows, _, _ = measured
    own, *peers = [row["losses"] for row in rows[:3]]
    assert len(own) == measurement.SKIPPED_STEPS + STEPS
    for losses in peers:
        assert losses == pytest.approx(own, rel=1e-4)  # other samples differ by more
    assert len({round(loss, 2) for loss in own}) > 1


def test_a_case_that_fails_is_a_row_with_the_end_of_its_log(
    measured: tuple[list[dict[str, Any]], str, Path],
) -> None:
    rows, printed, work = measured
    assert "lora_rr" in rows[-1]["log"][-1] and rows[-1]["log"][-1] in printed
    assert not list((work / "runs").iterdir())


def test_a_trajectory_repeats_a_run_and_ends_before_anything_is_saved(
    measured: tuple[list[dict[str, Any]], str, Path],
) -> None:
    rows, _, work = measured
    out, steps = work / "losses.csv", measurement.SKIPPED_STEPS + STEPS
    printed, code = bench(work, "--trajectory", "tiny-lora", "--steps", steps, "--out", out, "--keep")
    assert code == 0, printed
    assert out.read_text().splitlines() == ["step,tiny-lora", *(f"{n},{x}" for n, x in enumerate(rows[0]["losses"], 1))]
    assert out.with_suffix(".png").stat().st_size > 1000
    (run,) = (work / "runs").glob("*/run")
    assert (run / "metrics.jsonl").exists()
    assert not (run / "export").exists() and not list(run.glob("checkpoints/*"))


# -- without a run ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_that_of_the_model(name: str) -> None:
    shape = SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape.config()))
    assert dict(tensors(shape)) == {key: tuple(value.shape) for key, value in model.state_dict().items()}
    embedding = model.get_input_embeddings().weight.numel()
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters()) - embedding


def test_a_variant_changes_flags_and_ranks() -> None:
    changed = variant("full-1.3b+compile=true+ranks=2+flash_attention_4=true+learning_rate=1e+3")
    assert changed.ranks == 2
    flags = {"compile": "true", "flash_attention_4": "true", "learning_rate": "1e+3"}
    assert changed.flags == {**CASES["full-1.3b"].flags, **flags}
    with pytest.raises(ValueError, match="full-2b"):
        variant("full-2b+compile=true")


def test_mfu_counts_what_the_formula_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaMA-7B has 6.607 billion parameters besides the embedding: 13,500 slots/s are 58.5 % of 989 TFLOP/s."""
    monkeypatch.setattr(measurement.shutil, "which", lambda name: name)
    found = measurement._mfu(CASES["full-7b"], {"slots_per_second": 13_500}, settings(tmp_path))
    assert found["mfu"] == pytest.approx(0.5851, abs=1e-4)
    adapters = measurement._mfu(CASES["lora-7b"], {"slots_per_second": 13_500}, settings(tmp_path))
    assert adapters["mfu"] == pytest.approx(0.4047, abs=1e-4)


@pytest.mark.parametrize("cards", [1, 2, 4, 8])
def test_the_cases_of_a_number_of_cards_run_on_as_many(cards: int) -> None:
    names = of_cards(cards)
    assert {CASES[name].ranks for name in names} == {1, cards}
    assert [name for name in CASES if CASES[name].ranks == cards and CASES[name].needs_gpu] == [
        name for name in names if CASES[name].ranks == cards
    ]
    for name in names:  # what a card holds of a batch is divided among the ranks of a tensor parallel group
        assert cards % int(CASES[name].flags.get("tensor_parallel_size", 1)) == 0


def write_marks(folder: Path, rank: int, *, counts: bool) -> None:
    """Six steps of ``step`` seconds and ``10 x step`` tokens, each; three of them are not measured."""
    lines: list[dict[str, Any]] = [{"event": "start", "at": 5.0, "counts": counts}]
    for step in range(1, 7):
        taken = {"seconds": None if step == 1 else float(step), "tokens": 10 * step * step, "slots": 20 * step * step}
        lines.append({"event": "step", "step": step, "parts": {"forward": 1.0, "backward": 2.0, "optimizer": 0.5}})
        lines[-1] |= taken | {"supervised": step}
    lines += [{"event": "first", "at": 12.0}, {"event": "last", "at": 30.0, "allocated": 2**30 * (rank + 1)}]
    lines += [{"event": "end", "at": 31.0, "allocated": 2**30 * 9}]  # after training
    (folder / f"rank-{rank}.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"cut off')


def test_ranks_add_up_and_tensor_parallel_ranks_count_once(tmp_path: Path) -> None:
    for rank, counts in enumerate((True, False, True, False)):
        write_marks(tmp_path, rank, counts=counts)
    said = "  about 1,058.1 of 79.2 GiB\n    on each GPU, with rows of 4,096: weights 12.6"  # as lines are wrapped
    outcome = Outcome("command", 0, began=10.0, ended=33.0, log=said, device_gib=None)
    row = measurement.row_of(CASES["tiny-x2"], "panda", outcome, tmp_path, settings(tmp_path))
    assert row["estimated_gib"] == 1058.1
    assert row["steps"] == 3 and row["step_seconds"] == {"median": 5.0, "min": 4.0, "max": 6.0}
    assert row["tokens_per_second"] == 100 and row["slots_per_second"] == 200
    assert row["tokens_per_second_mean"] == pytest.approx(2 * 10 * (16 + 25 + 36) / 15)
    assert row["parts"] == {"forward": 1.0, "backward": 2.0, "optimizer": 0.5, "rest": 1.5}  # no record of data
    assert row["peak_allocated_gib"] == 4.0
    assert (row["to_first_step"], row["after_last_step"]) == (2.0, 3.0)


@pytest.mark.parametrize(
    ("ends", "ranks", "status"),
    [(False, 2, "ok"), (True, 2, "failed, exit code 1"), (False, 0, "failed, exit code 1")],
)
def test_ranks_that_are_stopped_after_their_last_step_have_not_failed(
    tmp_path: Path, ends: bool, ranks: int, status: str
) -> None:
    """One is stopped before the other, which reports it as killed."""
    for rank in range(ranks):
        write_marks(tmp_path, rank, counts=True)
    outcome = Outcome("command", 1, began=10.0, ended=33.0, log="rank 1 was killed", device_gib=None)
    row = measurement.row_of(CASES["tiny-x2"], "panda", outcome, tmp_path, settings(tmp_path, ends=ends))
    assert row["status"] == status


@pytest.mark.parametrize(
    ("code", "log", "status"),
    [
        (0, "", "ok"),
        (1, "x\ntorch.OutOfMemoryError: CUDA", "out of memory"),
        (2, "error: no", "failed, exit code 2"),
        (None, "step 1", "not done after 23 s"),
    ],
)
def test_the_status_says_how_a_run_ended(tmp_path: Path, code: int | None, log: str, status: str) -> None:
    write_marks(tmp_path, 0, counts=True)
    outcome = Outcome("command", code, began=10.0, ended=33.0, log=log, device_gib=70.25)
    row = {"case": "c", "run": "panda"} | measurement.row_of(
        CASES["tiny"], "panda", outcome, tmp_path, settings(tmp_path)
    )
    assert row["status"] == status
    printed = table([row])
    assert "70.2" in printed and (status == "ok" or status in printed) and (not log or log.splitlines()[-1] in printed)


def test_a_run_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """With the processes that it has started, also in sessions of their own, as torchrun starts ranks."""
    code = (
        "import subprocess; child = subprocess.Popen(['sleep', '60'], start_new_session=True);"
        " print(child.pid, flush=True); child.wait()"
    )
    outcome = measurement._run([sys.executable, "-c", code], tmp_path / "run", settings(tmp_path, timeout=3.0), 1, {})
    assert outcome.code is None and outcome.ended - outcome.began < 30
    child = Path(f"/proc/{int(outcome.log)}/cmdline")
    soon = time.monotonic() + 10  # its parent is waited for, and the child, killed with it, may be there for a moment
    while (alive := child.exists() and child.read_bytes()) and time.monotonic() < soon:
        time.sleep(0.05)
    assert not alive  # gone, or a zombie


def test_memory_of_the_run_before_is_not_that_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that holds 61 GiB for a moment longer, and 3 while a process runs."""
    read = tmp_path / "read"
    card = tmp_path / "nvidia-smi"
    card.write_text(
        f"#!/bin/sh\necho >> {read}\nif [ $(wc -l < {read}) -lt 4 ]; then echo 62464; else echo 0; fi\n"
        'case "$*" in *-lms*) echo 3072; exec sleep 60;; esac\n'
    )
    card.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    outcome = measurement._run(
        [sys.executable, "-c", "import time; time.sleep(1)"], tmp_path / "run", settings(tmp_path), 1, {}
    )
    assert outcome.device_gib == 3


def test_what_cannot_run_or_no_longer_fits_is_skipped(tmp_path: Path) -> None:
    cpu, one_card = {"cards": 0}, {"cards": 1}
    assert not obstacle(CASES["tiny-x2"], cpu)
    assert "GPU" in obstacle(CASES["lora-7b"], cpu)
    assert "2 cards" in obstacle(CASES["lora-7b-x2-zero1"], one_card)
    spent = settings(tmp_path, deadline=time.monotonic() + 5)
    row = one("tiny", CASES["tiny"], "panda", spent, None, cpu)  # type: ignore[arg-type]
    assert row == {"status": "skipped: the budget of the call is spent"}


def test_the_better_peer_is_that_of_the_same_batch() -> None:
    def row(run: str, rate: float, peer: str) -> dict[str, Any]:
        seconds = {"median": 1.0, "min": 1.0, "max": 1.0}
        found = {"case": "c", "run": run, "peer": peer, "tokens_per_second": rate, "status": "ok"}
        return found | {"steps": 10, "step_seconds": seconds, "mfu": 0.5}

    rows = [row("panda", 30, "a"), row("hf", 10, "a"), row("hf-deepspeed", 20, "a"), row("hf", 29, "b")]
    last = [line.rstrip(" |").split("| ")[-1] for line in table(rows).splitlines()[2:]]
    assert last[0] == "1.50" and "50.0%" in table(rows)


def test_more_flags_replace_those_of_the_case(tmp_path: Path) -> None:
    flags = measurement.panda_flags(CASES["tiny"], settings(tmp_path, extra=("--max-seq-length", "32")), 5)
    assert "--max_seq_length" not in flags and flags[-2:] == ["--max-seq-length", "32"]
    assert flags[flags.index("--max_steps") + 1] == "5"


def test_names_of_panda_are_known_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(measurement.metadata, "distribution", missing)
    site = measurement._site(settings(tmp_path))
    found = {
        (point.group, point.name, point.value)
        for distribution in metadata.distributions(path=[str(site)])
        for point in distribution.entry_points
    }
    assert ("panda.tasks", "pretrain", "panda.tasks.pretrain") in found
    assert ("panda.plugins", "bench-probe", "bench.gpu.probe") in found


def test_chats_have_the_lengths_that_they_claim() -> None:
    rows = list(text.chats())
    assert rows == list(text.chats())
    for field, (mean, deviation) in {"input": text.QUESTION, "target": text.ANSWER}.items():
        logarithms = [math.log(len(row[field])) for row in rows]
        assert statistics.mean(logarithms) == pytest.approx(mean, abs=0.03)
        assert statistics.stdev(logarithms) == pytest.approx(deviation, abs=0.03)


def test_rows_are_nearly_full() -> None:
    sizes = [len(f"{row['title']}\n{row['content']}".encode()) for row in text.windows()]
    assert sum(sizes) > 2_000_000
    assert sum(sizes) / sum(2048 * math.ceil(size / 2047) for size in sizes) > 0.9
    lengths = [len(row["input"].encode()) + len(row["target"].encode()) for row in text.answers(2048)]
    assert min(lengths) >= 2030 and max(lengths) <= 2048 - text.SPECIAL_TOKENS


def test_data_that_changed_is_written_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    text.write_rows("answers", 64, file)
    first = file.stat().st_mtime_ns
    text.write_rows("answers", 64, file)
    assert file.stat().st_mtime_ns == first
    text.write_rows("answers", 32, file)
    assert file.stat().st_mtime_ns > first


def test_differences_are_those_from_the_first_variant() -> None:
    said = trajectory.differences({"a": [4.0, 2.0, 2.0, 2.0], "b": [4.0, 2.5, None, 2.2]})
    assert "| b | 3 | 5.00e-01 | 2.33e-01 | 2.00e-01 | 2.2000 | +10.00% of a |" in said


def test_a_checkpoint_of_another_shape_is_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings(tmp_path).checkpoint(CASES["tiny"])
    monkeypatch.setitem(SHAPES, "tiny", replace(SHAPES["tiny"], layers=3))
    assert settings(tmp_path).checkpoint(CASES["tiny"]) != before


def test_variants_are_named_by_the_flags_that_set_them_apart() -> None:
    assert trajectory.short_names(["tiny+a=1+b=2", "tiny+a=1+b=3", "tiny+a=1"]) == ["b=2", "b=3", "tiny"]
