from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import run_code

from panda.configuration.options import RunOptions
from panda.engine.deepspeed_config import OWNERS
from panda.engine.deepspeed_config import REFUSED
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.deepspeed_keys import KEYS_FILE
from panda.registry import UserError

KEYS = json.loads(KEYS_FILE.read_text())
ON_ONE_CPU = 'import os; os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}\n'


def config_with(folder: Path, content: object, stage: int = 1) -> dict[str, Any]:
    """DeepSpeed's configuration in a run whose file holds ``content``."""
    file = folder / "more.json"
    file.write_text(json.dumps(content, indent=1))
    return deepspeed_config(RunOptions(zero_stage=stage, deepspeed_config=str(file)), world_size=1, on_gpu=True)


def test_it_follows_from_the_flat_keys() -> None:
    options = RunOptions(
        per_gpu_train_batch_size=3, gradient_accumulation_steps=5, max_grad_norm=0.0, precision="bf16", zero_stage=2
    )
    config = deepspeed_config(options, world_size=4, on_gpu=True)
    assert config["train_batch_size"] == 60
    assert config["gradient_clipping"] == 0.0  # written, since DeepSpeed's default is 1.0
    assert config["bf16"] == {"enabled": True, "immediate_grad_update": True} and config["fp16"] == {"enabled": False}
    assert config["zero_optimization"]["stage"] == 2


def test_keys_that_panda_does_not_own_are_added(tmp_path: Path) -> None:
    config = config_with(tmp_path, {"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True})
    assert config["zero_optimization"] == {"stage": 1, "overlap_comm": False}
    assert config["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    "content",
    [
        {"zero_optimization": {"reduce_bucket_size": 5e8}},  # as DeepSpeed's documentation writes it
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}, "offload_param": None}},
        {"zero_optimization": {"leaf_module": {"classes": ["Expert"]}, "stage3_prefetch_bucket_size": 0}},
        {"zero_optimization": {"zenflow": {"select_interval": 5, "select_strategy": "step"}}},
        {"checkpoint": {"tag_validation": "Ignore"}, "steps_per_print": None, "communication_data_type": "bf16"},
        {"timers": {"throughput": {"synchronized": False}}, "aio": {"block_size": 262144}, "log_level": "error"},
        {"flops_profiler": {"enabled": True, "output_file": None}, "wandb": {"team": None, "project": "pandas"}},
    ],
)
def test_what_deepspeed_takes_is_added_as_it_is(tmp_path: Path, content: dict[str, Any]) -> None:
    config = config_with(tmp_path, content)
    for key, value in content.items():
        held = config[key]
        assert (held if not isinstance(held, dict) else {name: held[name] for name in value}) == value


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        # panda's own
        ({"gradient_clipping": 1.0}, 2, ["'gradient_clipping'", "`max_grad_norm`"]),
        ({"zero_optimization": {"stage": 3}}, 3, ["'zero_optimization.stage'", "`zero_stage`"]),
        ({"optimizer": {"type": "Adam"}}, 2, ["'optimizer'", "`optimizer`"]),
        ({"torch_autocast": {"enabled": True}}, 2, ["'torch_autocast'", "`precision`"]),
        # what a run of panda cannot use
        ({"gradient_allreduce_op": "sum"}, 2, ["'gradient_allreduce_op'", "would change the loss"]),
        ({"tensor_parallel": {"autotp_size": 2}}, 2, ["'tensor_parallel'", "data-parallel"]),
        ({"activation_checkpointing": {"xyz": 1}}, 2, ["'activation_checkpointing'", "do nothing"]),
        ({"checkpoint": {"load_universal": True}}, 3, ["'checkpoint.load_universal'", "own checkpoints"]),
        ({"checkpoint": {"writer": {"decoupled": True}}}, 3, ["'checkpoint.writer'", "complete"]),
        # what DeepSpeed has removed
        ({"elasticity": {"enabled": False}}, 2, ["'elasticity' is no longer in DeepSpeed", "Elastic training"]),
        ({"nebula": {}}, 2, ["'nebula' is no longer in DeepSpeed"]),
        ({"sparse_gradients": False}, 2, ["'sparse_gradients' is no longer in DeepSpeed"]),
        (
            {"zero_optimization": {"mics_shard_size": 2}},
            3,
            ["'zero_optimization.mics_shard_size' is no longer", "MiCS"],
        ),
        ({"zero_optimization": {"cpu_offload": True}}, 3, ["old name", "`offload_optimizer`"]),
        # what it never had
        ({"dump_state": True, "wall_clock_breakdwn": True}, 3, ["no such key", "mean 'wall_clock_breakdown'"]),
        ({"zero_optimization": {"ofload_optimizer": {}}}, 3, ["'zero_optimization.ofload_", "'offload_optimizer'"]),
        (
            {"zero_optimization": {"offload_param": {"devic": 1}}},
            4,
            ["in 'zero_optimization.offload_param'", "'device'"],
        ),
        (
            {"zero_optimization": {"zenflow": {"topkratio": 1}}},
            4,
            ["'zero_optimization.zenflow.topkratio'", "'topk_ratio'"],
        ),
        ({"flops_profiler": {"module_dept": 2}}, 3, ["'flops_profiler.module_dept'", "'module_depth'"]),
        ({"aio": {"xyz": 2}}, 3, ["'aio.xyz'", "Take it out"]),
        ({"timers": {"throughput": {"enable": True}}}, 4, ["'timers.throughput.enable'", "'enabled'"]),
        # values
        ({"zero_optimization": True}, 2, ["'zero_optimization' is true", "expected an object"]),
        ({"zero_optimization": None}, 2, ["'zero_optimization' is null", "expected an object"]),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, 3, ['is "many"', "expected an integer above 0"]),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, 3, ["is 0", "expected an integer above 0"]),
        ({"zero_optimization": {"reduce_bucket_size": 1.5}}, 3, ["is 1.5", "expected an integer"]),
        ({"zero_optimization": {"overlap_comm": "auto"}}, 3, ['is "auto"', "true or false", "Hugging Face"]),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "disk"}}},
            4,
            ['is "disk"', '"cpu" or "none" or "nvme"'],
        ),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 2}}}, 4, ["is 2", "at least 0.0 and at most 1.0"]),
        ({"zero_optimization": {"leaf_module": {"classes": [1]}}}, 4, ["leaf_module.classes", "expected a text"]),
        ({"wall_clock_breakdown": 1}, 2, ["is 1", "expected true or false"]),
        ({"communication_data_type": "fp8"}, 2, ['is "fp8"', '"fp16" or "bf16" or "fp32"']),
        # values that need others
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, 4, ["offload_optimizer.ratio", "zero_stage: 3"]),
        ({"zero_optimization": {"zenflow": {"select_interval": "x"}}}, 4, ["zenflow.select_interval", "'auto'"]),
    ],
)
def test_what_cannot_be_is_an_error_with_its_place(
    tmp_path: Path, content: dict[str, object], line: int, words: list[str]
) -> None:
    with pytest.raises(UserError) as raised:
        config_with(tmp_path, content)
    message = str(raised.value)
    assert message.startswith(f"deepspeed_config: {tmp_path}/more.json:{line}: ")
    assert [word for word in words if word not in message] == []


def test_a_key_of_which_the_line_is_not_known_is_refused_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / "tabs.json"
    file.write_text('{\n\t"nebula": {}\n}')  # JSON, and no YAML
    with pytest.raises(UserError, match=r"tabs\.json: 'nebula' is no longer"):
        deepspeed_config(RunOptions(deepspeed_config=str(file)), world_size=1, on_gpu=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        (None, "No such file"),
        ('{"dump_state": true, "dump_state": false}', "'dump_state' appears twice"),
        ('{"aio": {"block_size": 1, "block_size": 2}}', "'block_size' appears twice"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "more.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=words) as raised:
        deepspeed_config(RunOptions(deepspeed_config=str(file)), world_size=1, on_gpu=True)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 1), ("fp16", 1)])
def test_gradients_of_16_bits_are_summed_in_fp32_unless_told_otherwise(precision: Any, stage: int) -> None:
    config = deepspeed_config(RunOptions(precision=precision), world_size=1, on_gpu=True)
    assert config["zero_optimization"]["stage"] == stage
    assert config.get("data_types") == ({"grad_accum_dtype": "fp32"} if stage else None)


@pytest.mark.parametrize(("stage", "micro_batches", "sums"), [(1, 1, True), (2, 1, False), (3, 1, False), (3, 2, True)])
def test_one_micro_batch_is_summed_only_where_deepspeed_would_change_its_optimizer(
    stage: Any, micro_batches: int, sums: bool
) -> None:
    options = RunOptions(precision="bf16", zero_stage=stage, gradient_accumulation_steps=micro_batches)
    assert ("data_types" in deepspeed_config(options, world_size=1, on_gpu=True)) == sums


def test_a_mistake_in_the_file_is_found_by_check_without_torch(tmp_path: Path) -> None:
    (tmp_path / "more.json").write_text('{"zero_optimization": {"ofload_optimizer": {}}}')
    code = """
import sys
from panda.cli.check import main
code = main(["--arch", "llama-tiny", "--deepspeed_config", "more.json"])
print(code, *sorted({"torch", "deepspeed", "pydantic", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "2"
    assert "error: deepspeed_config: more.json:1: 'zero_optimization.ofload_optimizer'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_keys_are_those_of_the_installed_deepspeed(tmp_path: Path) -> None:
    """`python -m panda.engine.deepspeed_keys` writes the file again: read what changes before you commit it."""
    code = "import json; from panda.engine.deepspeed_keys import deepspeed_keys; print(json.dumps(deepspeed_keys()))"
    installed = json.loads(run_code(ON_ONE_CPU + code, cwd=tmp_path).splitlines()[-1])
    assert len(installed["properties"]) > 40  # the parser was heard
    assert len(installed["properties"]["zero_optimization"]["properties"]) > 40
    assert {name: installed[name] for name in ("removed", "properties")} == {
        name: KEYS[name] for name in ("removed", "properties")
    }


def test_every_key_that_panda_takes_is_described() -> None:
    undescribed = {
        key
        for key, schema in KEYS["properties"].items()
        if schema.keys() <= {"type"} and schema.get("type", "object") == "object"
    }
    assert undescribed <= {*OWNERS, *REFUSED}
    assert {key.partition(".")[0] for key in (*OWNERS, *REFUSED)} <= {*KEYS["properties"], "sequence_parallel_size"}


WRONG = ["many", "auto", -1, 0, 1, 7.5, True, None, [], [1], {}, {"xyz": 1}]
"""Values, each of which is right for few keys."""


def test_what_deepspeed_refuses_panda_refuses(tmp_path: Path) -> None:
    """Each key with many values: DeepSpeed's parser raises only for what panda has refused already."""
    contents: list[dict[str, Any]] = []

    def vary(properties: dict[str, Any], *path: str) -> None:
        for name, schema in properties.items():
            for value in WRONG:
                content: Any = value
                for key in (name, *reversed(path)):
                    content = {key: content}
                contents.append(content)
            if "properties" in schema:
                vary(schema["properties"] | {"xyz": {}}, *path, name)

    vary(KEYS["properties"])
    taken = []
    for content in contents:
        try:
            taken.append((content, config_with(tmp_path, content)))
        except UserError as refused:
            assert f"{tmp_path}/more.json" in str(refused)
    assert len(contents) > 1000 and len(taken) > 100
    taken.remove(({"aio": {"use_gds": True}}, config_with(tmp_path, {"aio": {"use_gds": True}})))  # needs a GPU
    (tmp_path / "taken.json").write_text(json.dumps(taken))
    code = """
import json
from deepspeed.runtime.config import DeepSpeedConfig
wrong = []
for content, config in json.load(open("taken.json")):
    try:
        DeepSpeedConfig(config)
    except Exception as problem:
        wrong.append(f"{content}: {problem!r}")
print(json.dumps(wrong))
"""
    assert json.loads(run_code(ON_ONE_CPU + code, cwd=tmp_path).splitlines()[-1]) == []
