"""What is certain to have no room is refused before anything is made, and what is not certain is tried."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from panda.cli.train import main as train_main
from panda.configuration.options import RunOptions
from panda.engine import memory
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.memory import explaining_lack_of_memory
from panda.engine.memory import refuse_without_room
from panda.registry import UserError

HOST, GPU = 64 * 10**9, 80 * 10**9
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 1)
SEVEN, SEVENTY = 6_738_415_616, 68_976_648_192


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_host_memory", lambda: HOST)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=GPU))
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("parameters", "options", "device", "world_size", "drawn", "message"),
    [
        (SEVEN, {}, CPU, 1, True, None),
        (SEVENTY, {}, CPU, 1, True, "275.9 GB in 32 bits, and this machine has 64.0 GB in all"),
        (SEVENTY, {"precision": "bf16", "zero_stage": 3}, CPU, 4, False, None),  # the others are elsewhere
        (SEVENTY, {"precision": "bf16", "zero_stage": 2}, CPU, 4, False, "138.0 GB in 16 bits"),
        (SEVENTY, {"use_quant": True, "precision": "bf16"}, CPU, 1, False, None),
        (SEVENTY, {"use_quant": True, "quant_bits": 8, "precision": "bf16"}, CPU, 1, False, "69.0 GB in 8 bits"),
        (SEVENTY, {"precision": "bf16"}, CUDA, 8, False, "138.0 GB in 16 bits, and cuda:1 has 80.0 GB in all"),
        (SEVENTY, {"precision": "bf16", "zero_stage": 3}, CUDA, 2, False, None),
        (SEVENTY, {"precision": "bf16", "tensor_parallel_size": 2}, CUDA, 2, False, None),
        (SEVENTY, {"precision": "bf16", "tensor_parallel_size": 2}, CUDA, 2, True, "2 rank"),
        (SEVEN, {"precision": "bf16"}, CUDA, 8, True, None),
        (SEVENTY // 4, {"precision": "bf16"}, CUDA, 8, True, "69.0 GB in 32 bits, and this machine, on which 1 rank"),
    ],
)
def test_weights_are_compared_with_all_the_memory_that_they_are_to_be_in(
    parameters: int,
    options: dict[str, object],
    device: torch.device,
    world_size: int,
    drawn: bool,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if options.get("tensor_parallel_size"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    chosen = RunOptions(**options)  # type: ignore[arg-type]
    config = deepspeed_config(chosen, world_size=world_size, on_gpu=device.type == "cuda")
    try:
        refuse_without_room(parameters, chosen, config, device, world_size=world_size, drawn=drawn)
    except UserError as problem:
        assert message and message in str(problem)
    else:
        assert message is None


@pytest.mark.parametrize("launcher", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_ranks_of_one_machine_share_its_memory(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = RunOptions(precision="bf16")
    config = deepspeed_config(options, world_size=4, on_gpu=True)
    refuse_without_room(SEVEN, options, config, CUDA, world_size=4, drawn=True)
    monkeypatch.setenv(launcher, "4")
    with pytest.raises(UserError, match=r"107\.8 GB in 32 bits, and this machine, on which 4 rank"):
        refuse_without_room(SEVEN, options, config, CUDA, world_size=4, drawn=True)
    refuse_without_room(SEVEN, options, config, CUDA, world_size=4, drawn=False)


def test_weights_that_stay_in_host_memory_need_no_room_on_the_gpu() -> None:
    options = RunOptions(precision="bf16", zero_stage=3)
    config = deepspeed_config(options, world_size=1, on_gpu=True)
    with pytest.raises(UserError, match="cuda:1 has"):
        refuse_without_room(SEVENTY, options, config, CUDA, world_size=1, drawn=False)
    config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    refuse_without_room(SEVENTY, options, config, CUDA, world_size=1, drawn=False)


def test_an_arch_without_room_is_told_before_the_data_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.json").write_text("no JSON")
    argv = ["--task", "instruct", "--arch", "llama-65b", "--optimizer", "lamb"]
    assert train_main([*argv, "--instruction_tuning_data_dir", str(tmp_path)]) == 2
    assert "the model has 65,285,660,672 weights, which take 261.1 GB in 32 bits" in capsys.readouterr().err


def test_a_container_has_what_it_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    whole = memory._host_memory()
    limit, none = tmp_path / "limit", tmp_path / "none"
    limit.write_text("1000000\n")
    none.write_text("max\n")
    monkeypatch.setattr(memory, "_LIMITS", (none, tmp_path / "missing"))
    assert memory._host_memory() >= whole > 10**8
    monkeypatch.setattr(memory, "_LIMITS", (none, limit))
    assert memory._host_memory() == 1_000_000


def test_a_gpu_without_memory_says_what_takes_less() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught, explaining_lack_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "gradient_accumulation_steps" in caught.value.__notes__[0]
