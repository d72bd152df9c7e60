"""``panda runs``, and ``panda plot`` of runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from panda.cli import plot
from panda.cli import runs
from panda.cli.run_folders import short_names
from panda.files.locks import held


def make(run: Path, losses: list[float | None], **provenance: Any) -> Path:
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("task: instruct\n")
    (run / "provenance.json").write_text(json.dumps({"total_steps": 10} | provenance))
    steps = {"learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1234.5, "step_seconds": 1.0}
    records = [{"step": step, "loss": loss, "tokens": step, **steps} for step, loss in enumerate(losses, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return run


@pytest.fixture
def some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    make(folder / "finished", [2.0, 1.0, 1.5], end={"step": 3})
    with (folder / "finished" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "eval_loss": 1.25}\n{"step": 3, "eval_loss": 1.75}\n')
    make(folder / "stopped", [2.0], end={"step": 1, "stopped": {"by": "early_stopping", "reason": "no better"}})
    make(folder / "lab" / "interrupted", [3.0, None]).joinpath("checkpoints", "step-00000001").mkdir()
    make(folder / "lab" / "without", [])
    os.utime(folder / "stopped", (0, 0))
    (folder / "no_run" / "export").mkdir(parents=True)
    return folder


def rows(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert runs.main([*argv, "--json"]) == 0
    return {row["run"]: row for row in json.loads(capsys.readouterr().out)}


def test_runs_are_listed_with_their_status(some: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(some / "lab" / "without" / ".lock"):
        found = rows(capsys)
    assert {run: row["status"] for run, row in found.items()} == {
        "finished": "finished",
        "stopped": "stopped early",
        "lab/interrupted": "interrupted",
        "lab/without": "starting",
    }
    assert rows(capsys)["lab/without"]["status"] == "ended without a checkpoint"
    finished = found["finished"]
    assert [finished[key] for key in ("step", "total_steps", "loss", "least_loss")] == [3, 10, 1.5, 1.0]
    assert [finished[key] for key in ("eval_loss", "best_eval_loss", "tokens_per_second")] == [1.75, 1.25, 1234.5]
    assert found["lab/interrupted"]["loss"] is None and found["lab/interrupted"]["least_loss"] == 3


def test_a_run_is_as_good_as_what_it_compares_evaluations_by(some: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = some / "finished"
    by_loss = [rows(capsys)["finished"][key] for key in ("best_metric", "best_value", "best_step", "higher_is_better")]
    assert by_loss == ["eval_loss", 1.25, 2, False]
    (run / "config.yaml").write_text("plugins: [best_checkpoint]\nbest_metric: eval_f1\nbest_higher_is_better: null\n")
    (run / "provenance.json").write_text('{"evaluation_metrics": {"eval_f1": "higher"}, "end": {"step": 3}}')
    text = (run / "metrics.jsonl").read_text().replace("1.25", '1.25, "eval_f1": 0.5')
    (run / "metrics.jsonl").write_text(text.replace("1.75", '1.75, "eval_f1": 0.75'))
    by_score = [rows(capsys)["finished"][key] for key in ("best_metric", "best_value", "best_step", "higher_is_better")]
    assert by_score == ["eval_f1", 0.75, 3, True]
    assert runs.main(["runs"]) == 0
    assert "0.75 f1" in capsys.readouterr().out


def test_a_run_that_trains_is_said_to(some: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(some / "finished" / ".lock"):
        assert rows(capsys)["finished"]["status"] == "training"


def test_the_table_is_sorted_and_fits_a_terminal(some: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main(["runs", "--sort", "loss"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "status", "step", "loss", "least", "eval", "best", "eval", "tokens/s", "age"]
    assert [line.split()[0] for line in lines[1:]] == ["finished", "stopped", "lab/interrupted", "lab/without"]
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize(
    ("columns", "left_out"), [(100, []), (80, ["least", "eval"]), (60, ["least", "eval", "tokens/s", "age"])]
)
def test_long_names_are_wrapped_in_their_column(
    columns: int,
    left_out: list[str],
    some: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [f"sweep-instruct-tiny/learning_rate=1e-{power},weight_decay=0.01,seed=0" for power in (3, 4)]
    for name in [*names, "x" * 70]:
        make(some / name, [2.0], end={"step": 1})
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert runs.main([str(some)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert all(len(line) < columns for line in lines)
    assert (last == f"no room for: {', '.join(left_out)} (`panda runs {some} --json` has all)") == bool(left_out)
    width = lines[0].index("status")
    joined = "".join(line[:width].strip() for line in [*lines, *([] if left_out else [last])])
    assert all(name in joined for name in [*names, "x" * 70, "lab/interrupted"])  # nothing of them is lost
    assert joined.count("learning_rate") == 2


def test_the_folder_may_be_a_run(
    some: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(folder: Path | str) -> list[str]:
        assert runs.main([str(folder), "--json", "--sort", "run"]) == 0
        return [row["run"] for row in json.loads(capsys.readouterr().out)]

    assert listed(some / "finished") == ["finished"]
    make(some / "finished" / "another", [1.0])
    assert sorted(listed(some / "finished")) == ["another", "finished"]
    monkeypatch.chdir(some / "stopped")
    assert listed(".") == ["stopped"]


def test_a_folder_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
    assert runs.main([str(tmp_path / "x")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_runs_are_plotted(some: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot.main(["runs/finished", "runs/stopped", "--x", "hours"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "finished: loss first 2, least 1, last 1.5, 3 records",
        "stopped: loss first 2, least 2, last 2, 1 record",
        "runs.png",
    ]
    assert plot.main(["runs/finished", "--metric", "eval_loss", "--out", "a.svg"]) == 0
    assert Path("runs.png").read_bytes().startswith(b"\x89PNG") and "<svg" in Path("a.svg").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["runs/nowhere"], "error: runs/nowhere: expected a run directory, with the config.yaml of its run in it.\n"),
        (
            ["runs/stopped", "runs/finished", "runs/stopped"],
            "error: runs/stopped: this run is named twice. Name it once.",
        ),
        (
            ["runs/stopped", "runs/./lab/../stopped"],
            "error: runs/./lab/../stopped: this run is named twice, by runs/st",
        ),
        (["runs/finished", "--out", "a.jpg"], "error: --out: 'a.jpg' is not a file in an existing folder that ends in"),
        (
            ["runs/stopped", "--metric", "eval_loss"],
            "error: --metric: stopped has no 'eval_loss' on record. Did you mean 'loss'? It has grad_",
        ),
    ],
)
def test_what_cannot_be_plotted_is_refused(
    some: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert plot.main(argv) == 2
    assert capsys.readouterr().err.startswith(message)


def test_names_are_the_parts_that_differ() -> None:
    paths = ["/a/runs/x/seed-1", "/a/runs/x/seed-2", "/a/runs/y"]
    assert short_names([Path(each) for each in paths]) == ["x/seed-1", "x/seed-2", "y"]
    assert short_names([Path("/a/runs/x")]) == ["x"]
    assert short_names([Path("/a"), Path("/a/b")]) == ["a", "b"]
