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


def test_layers_with_adapters_are_measured() -> None:
    few = ("--rows", 2, "--length", 256, "--rank", 8, "--steps", 1)
    printed = run_script(BENCH / "lora_layer.py", "--shape", "tiny", *few, cwd=BENCH)
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| tiny")]
    assert [row[1:4] for row in rows] == [
        [weights, whose, "plain"] for weights in ("bf16", "nf4") for whose in ("no adapters", "peft", "panda")
    ]
    updates = {(row[1], row[2]): float(row[7]) for row in rows if "adapters" not in row[2]}
    for weights in ("bf16", "nf4"):
        assert updates[weights, "peft"] < 0.8 < 0.9 < updates[weights, "panda"] < 1.1


def test_the_cost_of_displays_is_measured() -> None:
    printed = run_script(BENCH / "displays.py", "--steps", 40, "--most", 1000, cwd=BENCH)
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if "%" in line]
    assert [row[0] for row in rows] == ["wall", "wall", "CPU", "CPU"] and all(float(row[2]) > 0 for row in rows)
    assert "9 and 9 steps" in printed


def test_the_parts_of_a_save_are_measured() -> None:
    printed = run_script(BENCH / "saving.py", "--saves", 2, cwd=BENCH)
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith(("| 1 ", "| 2 "))]
    for row in rows:
        size, whole, *parts = (float(each.replace(",", "")) for each in row[1:])
        assert size > 8 and abs(whole - sum(parts)) < 1 and all(part > 0 for part in parts[:4])
    assert [float(row[-1]) > 0 for row in rows] == [False, True], "the second save removes the first checkpoint"
