"""A step that is rehearsed leaves nothing: the steps after it are those of a run without it, to the bit."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from launching import EVERY_WAY
from launching import run_script

ALL = [
    (precision, stage, offload)
    for precision, stage, offload in itertools.product(("fp32", "bf16", "fp16"), range(4), ("", "offload"))
    # panda refuses fp16 without ZeRO, and DeepSpeed offloads only with it.
    if (stage or not offload) and not (precision == "fp16" and stage == 0)
]
SOME = [
    *(("fp32", stage, "") for stage in range(4)),
    *(("bf16", stage, "") for stage in range(4)),
    *[
        ("fp32", 2, "offload"),
        ("bf16", 1, "offload"),
        ("bf16", 2, "offload"),
        ("bf16", 3, "offload"),
        ("fp16", 1, ""),
        ("fp16", 3, ""),
    ],
]
WAYS = ALL if EVERY_WAY else SOME


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[object, ...], list[list[str]]]:
    """By way, what is not as without a rehearsal on each rank."""
    script, folder = Path(__file__).with_name("rehearsed_steps.py"), tmp_path_factory.mktemp("rehearsed")
    printed = run_script(script, json.dumps(WAYS), ranks=request.param, cwd=folder)
    lines = (json.loads(line) for line in printed.splitlines() if line.startswith("["))
    return {tuple(way): problems for *way, problems in lines if isinstance(problems, list)}


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_nothing_is_left_of_what_is_rehearsed(
    found: dict[tuple[object, ...], list[list[str]]], way: tuple[object, ...]
) -> None:
    assert [problem for of_rank in found[way] for problem in of_rank] == []
