"""The scripts in bench/ run; on the CPU, at a size that says nothing about speed."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import run_script

BENCH = Path(__file__).parent.parent / "bench"


@pytest.mark.parametrize("more", [(), ("--zero_stage", "1")], ids=["alone", "zero-1"])
def test_the_optimizer_step_is_measured(more: tuple[str, ...]) -> None:
    printed = run_script(BENCH / "optimizer_step.py", "--shape", "tiny", "--steps", 2, *more, cwd=BENCH)
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| tiny")]
    assert [row[2] for row in rows] == ["adamw, fused", "nvlamb", "nvlamb, weight decay"] * (1 if more else 2)
    assert all(float(row[3]) > 0 for row in rows)
