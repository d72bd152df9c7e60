from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import run_code

from panda.configuration.options import RunOptions
from panda.engine.deepspeed_config import _OWNERS
from panda.engine.deepspeed_config import _REFUSED
from panda.engine.deepspeed_config import _TAKEN
from panda.engine.deepspeed_config import deepspeed_config
from panda.registry import UserError


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
        ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op", "would change the loss"]),
        ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel", "data-parallel"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast", "precision"]),
        ({"zero_optimization": True}, ["zero_optimization", "expected an object"]),
        ({"zero_optimization": None}, ["zero_optimization", "expected an object"]),
        ({"wall_clock_breakdwn": True}, ["no key 'wall_clock_breakdwn'", "'wall_clock_breakdown'"]),
    ],
)
def test_a_key_that_panda_owns_or_nobody_knows_is_an_error(
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


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 1), ("fp16", 1)])
def test_gradients_of_16_bits_are_summed_in_fp32_unless_told_otherwise(precision: Any, stage: int) -> None:
    config = deepspeed_config(RunOptions(precision=precision), world_size=1, on_gpu=True)
    assert config["zero_optimization"]["stage"] == stage
    assert config.get("data_types") == ({"grad_accum_dtype": "fp32"} if stage else None)


def test_every_key_that_deepspeed_reads_is_taken_owned_or_refused(tmp_path: Path) -> None:
    """DeepSpeed's own parser is given a dictionary that writes down what is looked up in it."""
    code = """
import json, os
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
from deepspeed.runtime.config import DeepSpeedConfig
seen = set()
class Recording(dict):
    def get(self, key, default=None): seen.add(key); return super().get(key, default)
    def __contains__(self, key): seen.add(key); return super().__contains__(key)
    def __getitem__(self, key): seen.add(key); return super().__getitem__(key)
    def __deepcopy__(self, memo): return self
DeepSpeedConfig(Recording(train_batch_size=1))
print(json.dumps(sorted(seen)))
"""
    read = set(json.loads(run_code(code, cwd=tmp_path).splitlines()[-1]))
    assert len(read) > 40  # the parser was heard
    assert read <= {*_TAKEN, *_OWNERS, *_REFUSED}
