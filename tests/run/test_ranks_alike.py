"""Ranks that were not started alike do not train."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from panda.testing.processes import start
from panda.testing.runs import as_flags

UNLIKE = '''
"""Starts panda-train on each rank, with the flags of that rank."""

import json
import os
import sys

from panda.cli.train import main

flags = json.loads(os.environ["FLAGS_OF_RANKS"])
sys.exit(main([*sys.argv[1:], *flags[int(os.environ["RANK"])]]))
'''
OPTIONS = {
    **{"task": "instruct", "arch": "llama-tiny", "num_layers": 1, "hidden_size": 16, "intermediate_size": 16},
    **{"num_heads": 2, "max_seq_length": 32, "num_workers": 0, "max_steps": 2, "timeout": 1, "output_dir": "run"},
}


def rows(folder: Path, count: int = 24, answer: str = "x") -> Path:
    """Data of ``count`` rows."""
    folder.mkdir()
    lines = [json.dumps({"input": f"{number}", "target": answer}) + "\n" for number in range(count)]
    (folder / "a.jsonl").write_text("".join(lines))
    return folder


def started(tmp_path: Path, *of_ranks: dict[str, object]) -> tuple[int | None, str]:
    """The exit code and the output of a run with ``of_ranks`` over OPTIONS, or beside them."""
    (tmp_path / "unlike.py").write_text(UNLIKE)
    flags = json.dumps([[*as_flags({**OPTIONS, **options}), "-p", "no:plot"] for options in of_ranks])
    with start(tmp_path / "unlike.py", cwd=tmp_path, ranks=2, FLAGS_OF_RANKS=flags) as process:
        done = process.wait()
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"learning_rate": 4e-3}, "learning_rate is 0.002 on rank 0 and 0.004 on rank 1."),
        ({"max_steps": 3}, "max_steps is 2 on rank 0 and 3 on rank 1."),
        ({"plugins": "ema"}, "ema_decay is not set on rank 0 and 0.999 on rank 1"),
    ],
)
def test_another_configuration(tmp_path: Path, more: dict[str, object], said: str) -> None:
    given: dict[str, object] = {"instruction_tuning_data_dir": rows(tmp_path / "rows"), "learning_rate": 2e-3}
    code, printed = started(tmp_path, given, given | more)
    assert code and "the ranks were not started alike: " in printed and said in printed, printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"answer": "y"}, r"/rows/a\.jsonl is \S+ bytes \(\w+\) on rank 0 and not set on rank 1; "),
        ({"count": 23}, r"samples of the data is 24 on rank 0 and 23 on rank 1; "),
    ],
)
def test_other_data(tmp_path: Path, changed: dict[str, object], said: str) -> None:
    folders = rows(tmp_path / "rows"), rows(tmp_path / "others", **changed)  # type: ignore[arg-type]
    code, printed = started(tmp_path, *({"instruction_tuning_data_dir": each} for each in folders))
    assert code and re.search(said, printed), printed


def test_the_same_data_elsewhere_is_the_same(tmp_path: Path) -> None:
    folders = rows(tmp_path / "rows"), rows(tmp_path / "mounted")
    given = [{"instruction_tuning_data_dir": each, "num_workers": n} for n, each in enumerate(folders)]
    code, printed = started(tmp_path, *given)
    assert code == 0, printed
