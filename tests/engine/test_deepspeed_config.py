from __future__ import annotations

import json
from pathlib import Path

import pytest

from panda.engine.deepspeed_config import deepspeed_config
from panda.registry import UserError
from panda.run_options import RunOptions


def test_it_follows_from_the_flat_keys() -> None:
    options = RunOptions(
        per_gpu_train_batch_size=3, gradient_accumulation_steps=5, max_grad_norm=0.0, precision="bf16", zero_stage=2
    )
    config = deepspeed_config(options, world_size=4, on_gpu=True)
    assert config["train_batch_size"] == 60
    assert config["gradient_clipping"] == 0.0  # written, since DeepSpeed's default is 1.0
    assert config["bf16"] == {"enabled": True} and config["fp16"] == {"enabled": False}
    assert config["zero_optimization"]["stage"] == 2


def test_keys_that_panda_does_not_own_are_added(tmp_path: Path) -> None:
    file = tmp_path / "more.json"
    file.write_text(json.dumps({"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True}))
    config = deepspeed_config(RunOptions(zero_stage=1, deepspeed_config=str(file)), world_size=1, on_gpu=True)
    assert config["zero_optimization"] == {"stage": 1, "overlap_comm": False}
    assert config["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"gradient_clipping": 1.0}, ["gradient_clipping", "max_grad_norm"]),
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage", "zero_stage"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer"]),
    ],
)
def test_a_key_that_panda_owns_is_an_error_that_names_both(
    tmp_path: Path, content: dict[str, object], words: list[str]
) -> None:
    file = tmp_path / "more.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError) as raised:
        deepspeed_config(RunOptions(deepspeed_config=str(file)), world_size=1, on_gpu=True)
    assert all(word in str(raised.value) for word in [*words, str(file)])


def test_a_file_that_is_missing_or_no_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "none.json"):
        with pytest.raises(UserError, match=name):
            deepspeed_config(RunOptions(deepspeed_config=str(tmp_path / name)), world_size=1, on_gpu=True)
