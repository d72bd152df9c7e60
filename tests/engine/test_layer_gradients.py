"""Under ZeRO-3 the gradients of a layer are reduced at once, and are those of one process."""

from __future__ import annotations

import json
from typing import Any

import pytest
from launching import TESTS
from launching import run_script
from summed_gradients import LAYERS
from summed_gradients import MICRO_BATCHES
from summed_gradients import STEPS
from summed_gradients import UNUSED
from summed_gradients import WAYS

ALL = LAYERS * STEPS * MICRO_BATCHES
SKIPPED = 2 * (STEPS - 1) + MICRO_BATCHES
"""Micro batches that leave a layer out: two in each step, and all three in one."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("gradients")
    run_script(TESTS / "engine/summed_gradients.py", folder / "found.json", cwd=folder, ranks=2)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("way", [way for way, of in (WAYS | UNUSED).items() if "precision" not in of])
def test_gradients_are_those_of_one_process(found: Any, way: str) -> None:
    assert max(found[way]["errors"]) < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_to_the_bit_those_of_deepspeed(found: Any, way: str) -> None:
    assert found[way]["same bits"] == [True] * STEPS


@pytest.mark.parametrize("way", WAYS | UNUSED)
def test_a_layer_is_reduced_once_in_each_backward_pass(found: Any, way: str) -> None:
    expected = {
        "one micro batch": LAYERS * STEPS,
        "fp16, gradients whose sum is too large": LAYERS * STEPS,
        "bf16, one micro batch": LAYERS * STEPS,
        "one layer frozen, one in part": ALL - STEPS * MICRO_BATCHES,
        "two passes before backward": 2 * ALL,
        "a layer used twice": ALL + STEPS * MICRO_BATCHES,
        "a weight that is first used before its layer": 2 * ALL - STEPS * MICRO_BATCHES,  # the first layer is the last
        "gradients on the host": 0,
        "a layer that some micro batches use": ALL - SKIPPED,
        "a shared weight of a layer that is not used": ALL - SKIPPED,
    }
    assert found[way]["reductions"] == expected.get(way, ALL)


@pytest.mark.parametrize("way", [way for way in WAYS | UNUSED if "on the host" not in way])
def test_a_layer_is_reduced_before_the_next_has_gradients_and_added_at_once(found: Any, way: str) -> None:
    """Weights that two layers have are left to DeepSpeed, and lie between others."""
    assert found[way]["waiting"] == (LAYERS if way == "a weight that is first used before its layer" else 1)
    assert (found[way]["apart"] > 0) == ("share" in way)


@pytest.mark.parametrize("way", WAYS | UNUSED)
def test_a_step_without_finite_gradients_is_skipped(found: Any, way: str) -> None:
    """The next step is right again, as the other tests see."""
    bad = (WAYS | UNUSED)[way].get("bad_step")
    assert found[way]["taken"] == [step != bad for step in range(STEPS)]
