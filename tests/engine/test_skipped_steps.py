"""A batch on one rank of two that is not finite, or spikes: all ranks skip the step, and go on as without it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from launching import EVERY_WAY
from launching import run_script

KINDS = ("nan", "inf", "spike")
ALL = [
    (precision, stage, offload, kind)
    for precision, stage, offload, kind in itertools.product(("fp32", "bf16", "fp16"), range(4), ("", "offload"), KINDS)
    # panda refuses fp16 without ZeRO, and DeepSpeed offloads only with it.
    if (stage or not offload) and not (precision == "fp16" and stage == 0)
]
FEW = [
    ("fp32", 0, "", "spike"),
    ("fp32", 3, "", "inf"),
    ("bf16", 0, "", "spike"),
    ("bf16", 1, "", "nan"),
    ("bf16", 2, "offload", "spike"),
    ("bf16", 3, "offload", "spike"),
    ("fp16", 1, "", "inf"),
    ("fp16", 2, "", "spike"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[object, ...], list[str]]:
    """By way, what was not as expected on each rank."""
    ways = ALL if EVERY_WAY else FEW
    printed = run_script(
        Path(__file__).with_name("skipped_steps.py"), json.dumps(ways), ranks=2, cwd=tmp_path_factory.mktemp("skipped")
    )
    lines = (json.loads(line) for line in printed.splitlines() if line.startswith("["))
    return {tuple(way): problems for *way, problems in lines}


@pytest.mark.parametrize("way", ALL if EVERY_WAY else FEW, ids=str)
def test_a_step_is_skipped_alike_and_the_rest_is_as_without_it(
    found: dict[tuple[object, ...], list[str]], way: tuple[object, ...]
) -> None:
    assert found[way] == ["", ""]
