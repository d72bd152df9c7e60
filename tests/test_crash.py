"""The short form of tests/crash.py: a few cases of each kind, by the command itself."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import crash
import pytest
from launching import run_script

COMMAND = Path(crash.__file__)
ROW = re.compile(r"^\| (.+) \| (\d+) \| (.*) \| (\d+) \|$", re.M)


def test_runs_that_are_killed_and_disturbed_end_with_the_same_bits(tmp_path: Path) -> None:
    few = ("--kills", 3, "--ranks", 1, "--calls", 2, "--ways", "exit", "EIO", "--seed", 5, "--flips", 100)
    faults = ("--fault_ranks", 2, "--stages", "layout", "DeepSpeed's loading")
    rows = ROW.findall(run_script(COMMAND, *few, *faults, cwd=tmp_path))
    assert all(row[3] == "0" for row in rows), rows
    names = ["SIGKILL", "the process ends", "EIO", "an exception in 1 stages of saving, on each subset of 2 ranks"]
    assert [row[0].partition(" at ")[0] for row in rows[:4]] == names
    assert [int(row[1]) for row in rows[:5]] == [3, 2, 2, 3, 3]
    assert len(rows) >= 11 and all(int(row[1]) >= 100 for row in rows[5:]), rows


def test_a_difference_is_found(tmp_path: Path) -> None:
    """What `difference` compares without a checkpoint."""
    for name in ("a", "b"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "export").mkdir()
        (tmp_path / name / "export" / "model.safetensors").write_bytes(b"weights")
        for file in ("checkpoints/latest", "answers.json"):
            (tmp_path / name / file).write_text("x")
        records = [{"step": 1, "loss": 2.0, "step_seconds": len(name)}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in records))
    run, plain = tmp_path / "a", tmp_path / "b"
    assert crash.difference(run, plain) is None
    changes = {
        "export/model.safetensors": (b"weighta", "export"),
        "metrics.jsonl": (b'{"step": 1, "loss": 2.5}\n', "metrics.jsonl, record 1"),
        "checkpoints/step-00000001": (b"", "checkpoints"),
        "checkpoints/latest": (b"y", "latest"),
        ".tmp-export": (b"", "left"),
    }
    for name, (content, said) in changes.items():
        before = (run / name).read_bytes() if (run / name).exists() else None
        (run / name).write_bytes(content)
        found = crash.difference(run, plain)
        assert found is not None and said in found, (name, found)
        (run / name).write_bytes(before) if before is not None else (run / name).unlink()


def test_work_that_is_lost_is_found(tmp_path: Path) -> None:
    samples = Path(__file__).parent / "run/samples/run-1"
    shutil.copytree(samples, run := tmp_path / "run")  # with a whole checkpoint of step 2
    assert crash.lost(run) is None
    with (run / "metrics.jsonl").open("a") as records:
        records.write('{"step": 3, "loss": 2.0, "learning_rate": 1.0}\n{"step": 4, "lo')
    assert crash.lost(run) is None, "the third step is lost, and the end of a line"
    (run / "checkpoints/step-00000002/manifest.json").write_text("{}")
    assert crash.lost(run) == "step 3 was taken, and the newest checkpoint is of step 0"


@pytest.mark.parametrize(
    ("printed", "codes", "expected"),
    [
        ("rank 1 failed: ValueError('the disk of this rank fails')", [1, 2], None),
        ("error on rank 0: rank 1: the disk of this rank fails", [2, 2], None),
        ("ranks 0 and 1 failed: ValueError('the disk of this rank fails')", [1, 2], "names [0, 1]"),
        ("ranks 0 to 2 failed: ValueError('the disk of this rank fails')", [1, 2], "names [0, 1, 2]"),
        ("ValueError: the disk of this rank fails", [1, 2], "names []"),
        ("rank 1 failed: ValueError('the disk of this rank fails')", [0, 2], "ends with"),
    ],
)
def test_what_an_error_names_is_judged(printed: str, codes: list[int], expected: str | None) -> None:
    row = crash.Row("faults")
    crash._judge_fault(row, crash.SAVING[0], (1,), crash.Ended(codes, printed))
    assert [expected in why for why in row.failures] == ([True] if expected else [])  # type: ignore[operator]
