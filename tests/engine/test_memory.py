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
from panda.engine.memory_parts import MemoryParts
from panda.engine.memory_parts import Sizes
from panda.engine.memory_parts import held
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


def parts_of(
    parameters: int, options: RunOptions, *, world_size: int, on_gpu: bool, offload: bool = False
) -> MemoryParts:
    config = deepspeed_config(options, world_size=world_size, on_gpu=on_gpu)
    if offload:
        config["zero_optimization"] |= {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    bits = options.quant_bits if options.use_quant else 32 if options.precision == "fp32" else 16
    here = parameters // options.tensor_parallel_size
    sizes = Sizes(0 if options.use_lora else here, here * bits // 8 * options.use_lora, here, 0, 0)
    return held(sizes, options, config, world_size=world_size, state_bytes=8).parts


@pytest.mark.parametrize(
    ("parameters", "options", "device", "world_size", "drawn", "message"),
    [
        (SEVEN, {}, CPU, 1, True, None),
        (SEVENTY, {}, CPU, 1, True, "275.9 GB in 32 bits, and this machine has 64.0 GB in all"),
        (SEVENTY, {"precision": "bf16", "zero_stage": 3}, CPU, 4, False, None),  # the others are elsewhere
        (SEVENTY, {"precision": "bf16", "zero_stage": 2}, CPU, 4, False, "138.0 GB in 16 bits"),
        (SEVENTY, {"use_quant": True, "use_lora": True, "precision": "bf16"}, CPU, 1, False, None),
        (
            SEVENTY,
            {"use_quant": True, "use_lora": True, "quant_bits": 8, "precision": "bf16"},
            CPU,
            1,
            False,
            "69.0 GB in 8 bits",
        ),
        # 2 bytes a weight, 4 of its master and 8 of AdamW on one of 8 ranks, 4 of the sum of gradients: 7.5 bytes each.
        (
            SEVENTY,
            {"precision": "bf16"},
            CUDA,
            8,
            False,
            "481.8 GiB before any activation (sums of gradients 257.0",
        ),
        (SEVENTY, {"precision": "bf16", "use_lora": True}, CUDA, 8, False, "128.5 GiB before any activation (weights"),
        (SEVENTY, {"precision": "bf16", "zero_stage": 3}, CUDA, 16, False, None),
        (SEVENTY, {"precision": "bf16", "zero_stage": 3}, CUDA, 8, False, "144.5 GiB"),
        (SEVENTY, {"precision": "bf16", "tensor_parallel_size": 16}, CUDA, 16, False, None),
        (SEVENTY, {"precision": "bf16", "tensor_parallel_size": 16}, CUDA, 16, True, "2 rank"),
        (SEVEN, {"precision": "bf16", "zero_stage": 2}, CUDA, 8, True, None),
        (SEVEN, {"precision": "bf16"}, CUDA, 1, False, "113.0 GiB before any activation (optimizer states 50.2, fp32"),
    ],
)
def test_what_is_held_for_certain_is_compared_with_all_the_memory_that_it_is_to_be_in(
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
    parts = parts_of(parameters, chosen, world_size=world_size, on_gpu=device.type == "cuda")
    try:
        refuse_without_room(parameters, parts, chosen, device, drawn=drawn, advice=lambda: "Instead: less.")
    except UserError as problem:
        assert message and message in str(problem)
        if device.type == "cuda" and not drawn:
            assert str(problem).endswith("and cuda:1 has 74.5 GiB in all. Instead: less.")
    else:
        assert message is None


@pytest.mark.parametrize("launcher", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_ranks_of_one_machine_share_its_memory(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = RunOptions(precision="bf16", zero_stage=3)
    parts = parts_of(SEVEN, options, world_size=4, on_gpu=True)
    refuse_without_room(SEVEN, parts, options, CUDA, drawn=True)
    monkeypatch.setenv(launcher, "4")
    with pytest.raises(UserError, match=r"107\.8 GB in 32 bits, and this machine, on which 4 rank"):
        refuse_without_room(SEVEN, parts, options, CUDA, drawn=True)
    refuse_without_room(SEVEN, parts, options, CUDA, drawn=False)


def test_what_stays_in_host_memory_needs_no_room_on_the_gpu() -> None:
    options = RunOptions(precision="bf16", zero_stage=3)
    with pytest.raises(UserError, match="cuda:1 has"):
        refuse_without_room(SEVENTY, parts_of(SEVENTY, options, world_size=1, on_gpu=True), options, CUDA, drawn=False)
    parts = parts_of(SEVENTY, options, world_size=1, on_gpu=True, offload=True)
    refuse_without_room(SEVENTY, parts, options, CUDA, drawn=False)


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


def test_a_gpu_without_memory_says_what_the_step_holds() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught, explaining_lack_of_memory(lambda: "weights 12.6"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert caught.value.__notes__ == ["weights 12.6"]


def test_an_estimate_that_fails_does_not_hide_the_lack_of_memory() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught, explaining_lack_of_memory(lambda: str(1 / 0)):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "ZeroDivisionError" in caught.value.__notes__[0]
