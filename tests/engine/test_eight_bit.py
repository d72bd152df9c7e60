"""8-bit optimizer state: near AdamW, by both its names, and resumed to the same bits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from launching import assert_same_end
from launching import losses
from launching import train_many

from panda.optim.adam_options import AdamOptions
from panda.optim.adamw import build_adamw
from panda.optim.eight_bit import build_adamw8bit
from panda.optim.eight_bit import build_paged_adamw8bit
from panda.registry import UserError
from panda.registry.contexts import OptimizerContext

SMALL = (
    *("--arch", "llama-tiny", "--num_layers", 2, "--hidden_size", 32, "--intermediate_size", 48, "--num_heads", 2),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 48, "--num_workers", 0),
    *("--per_gpu_train_batch_size", 3, "--gradient_accumulation_steps", 2, "--max_steps", 4, "--save_steps", 2),
    *("--weight_decay", 0.1, "-p", "no:tensorboard"),
)
STAGES = (0, 2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on two ranks: of each stage one, and one that continues a copy of its second step."""
    folder = tmp_path_factory.mktemp("eight_bit")
    runs: list[list[object]] = []
    for stage in STAGES:
        flags = [*SMALL, "--optimizer", "adamw8bit", "--zero_stage", stage, "--output_dir"]
        checkpoint = folder / f"{stage}/checkpoints/step-00000002"
        runs += [[*flags, folder / f"{stage}"], [*flags, folder / f"{stage}-resumed", "--resume", checkpoint]]
    runs.append([*SMALL, "--bit_training", "--zero_stage", 2, "--output_dir", folder / "bit_training"])
    runs.append([*SMALL, "--zero_stage", 2, "--output_dir", folder / "adamw"])
    train_many(runs, ranks=2, cwd=folder)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_ends_with_the_same_bits(folder: Path, stage: int) -> None:
    assert_same_end(folder / f"{stage}-resumed", folder / f"{stage}", after=2)


def test_bit_training_is_adamw8bit(folder: Path) -> None:
    assert losses(folder / "bit_training") == losses(folder / "2")
    assert losses(folder / "bit_training") == pytest.approx(losses(folder / "adamw"), rel=1e-3)
    assert losses(folder / "bit_training") != losses(folder / "adamw")


@pytest.mark.parametrize("build", [build_adamw8bit, build_paged_adamw8bit])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_its_means_take_a_byte_and_its_steps_are_near_those_of_adamw(build: object) -> None:
    moved = []
    for make in (build, build_adamw):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(64, 128))
        start = parameter.detach().clone()
        groups = [{"params": [parameter], "lr": 1e-2, "weight_decay": 0.1}]
        optimizer = make(AdamOptions(), OptimizerContext(groups, torch.device("cpu")))  # type: ignore[operator]
        for _ in range(20):
            parameter.grad = torch.randn(64, 128) + 0.5 * parameter.detach()
            optimizer.step()
        moved.append(parameter.detach() - start)
        if make is build:
            sizes = {key: value.dtype for key, value in optimizer.state[parameter].items() if key.startswith("state")}
            assert sizes == {"state1": torch.uint8, "state2": torch.uint8}
    assert float((moved[0] - moved[1]).norm() / moved[1].norm()) < 0.03


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    context = OptimizerContext([{"params": [torch.nn.Parameter(torch.ones(1))]}], torch.device("cpu"), True)
    for build in (build_adamw8bit, build_adamw):
        with pytest.raises(UserError, match=r"pip install 'panda-train\[gpu\]'"):
            build(AdamOptions(), context)  # type: ignore[operator]
