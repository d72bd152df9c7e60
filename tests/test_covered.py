"""The page of what works together names tests that are there, and says what panda does."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from covered import ROOT
from covered import TRIALS
from covered import Trial
from covered import _module
from covered import options_of

PAGE = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: f"{Path(trial.file).stem}-{trial.test}")
def test_a_row_names_a_test_that_trains_something(trial: Trial) -> None:
    runs = [*trial.runs()]
    assert runs and all(ranks in (1, 2, 3, 4, 6) for ranks, _ in runs)
    assert inspect.isfunction(getattr(_module(ROOT / trial.file), trial.test))
    assert f"| `{trial.file}`: `{trial.test}` | {trial.against} |" in PAGE


def row(name: str, section: str) -> dict[str, str]:
    """The cells of the row ``name``, by column."""
    lines = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return dict(zip(cells[0], next(each for each in cells if each[0] == name), strict=True))


def test_cells_say_what_is_refused_tried_and_not_tried() -> None:
    partitioned = row("ZeRO 3", "Where a run is spread, and what is trained")
    assert "refused" in partitioned["8 bits"] and re.match(r"\d", partitioned["NF4"])
    split = row("tensor parallel, ZeRO 1", "Where a run is spread, and what is trained")
    assert "refused" in split["LoRA"] and re.match(r"\d", split["all weights"])
    assert row("`muon`", "Precision and optimizer")["fp16"] == "not tried"
    assert "refused" in row("kto", "Tasks")["packed rows"] and re.match(r"\d", row("kto", "Tasks")["ZeRO 2"])


def test_flags_are_read_as_options() -> None:
    flags = ("--use_lora", "--lora_r", 4, "--resume", "x", "--compile")
    assert options_of(flags) == {"use_lora": True, "lora_r": "4", "resume": "x", "compile": True}
