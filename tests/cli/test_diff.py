"""`panda diff` names what two runs do not share, and the first step at which they part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from panda.cli.main import main


def run_directory(folder: Path, losses: list[float | None], rate: float = 0.1, **provenance: Any) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"seed: 0\nlearning_rate: {rate}\n")
    plain = {
        "started": str(folder),
        "samples": 5,
        "packages": {"torch": "2.13.0"},
        "end": {"agreement": {"data": "a1"}},
    }
    (folder / "provenance.json").write_text(json.dumps(plain | provenance))
    records = [
        {"step": step, "loss": loss, "learning_rate": 0.1, "grad_norm": 1.0} for step, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def printed(capsys: pytest.CaptureFixture[str], *runs: Path) -> str:
    assert main(["diff", *map(str, runs)]) == 0
    return capsys.readouterr().out


def test_runs_that_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (run_directory(tmp_path / name, [3.0, 2.5, None]) for name in "ab")
    assert printed(capsys, first, second) == (
        "Configuration, data, machine and versions are the same.\n"
        "loss: the same to the bit in 3 steps that are recorded of both.\n"
    )


def test_what_differs_and_the_first_step_that_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_directory(tmp_path / "a", [3.0, 2.5, 2.0, 1.0])
    second = run_directory(
        tmp_path / "b", [3.0, 2.5, 2.0000001, 1.5], rate=0.2, samples=6, end={"agreement": {"data": "b2", "seed": 0}}
    )
    out = printed(capsys, first, second)
    assert "configuration:\n  learning_rate  0.1  0.2\n" in out
    assert "data, model and machine:\n  samples  5  6\n" in out
    assert "what a resumed run has to share:\n  data  a1  b2\n" in out
    assert "versions" not in out and "are the same" not in out
    assert "loss: the same to the bit to step 2, and different from step 3 on:" in out
    assert "2.0  2.0000001  (+5.0e-08)" in out and "loss of step 4: 1.0  1.5  (+5.0e-01)" in out


def test_what_evaluations_record_follows_from_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_directory(tmp_path / "a", [3.0], evaluation_metrics={"eval_loss": "lower"})
    second = run_directory(tmp_path / "b", [3.0], evaluation_metrics={"eval_loss": "lower", "eval_rouge1": "higher"})
    assert "eval_rouge1" not in printed(capsys, first, second)


def test_runs_without_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run_directory(tmp_path / "a", [3.0]), run_directory(tmp_path / "b", [])
    (second / "provenance.json").write_text("{")
    out = printed(capsys, first, second)
    assert f"note: {second / 'provenance.json'} is missing or damaged" in out
    assert "loss: no step is recorded of both (1 of one, 0 of the other)." in out
    assert main(["diff", str(first), str(tmp_path)]) == 2
    assert f"error: {tmp_path}: expected a run directory" in capsys.readouterr().err
