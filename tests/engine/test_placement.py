"""Under ZeRO-3 no rank holds more of the weights than its share and one tensor while they are loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from launching import TESTS
from launching import run_script
from measure_placement import COUNT
from measure_placement import SIDE
from safetensors.torch import save_file

from panda.configuration.options import RunOptions
from panda.engine.placement import place
from panda.engine.processes import Processes
from panda.models.initialisation.creation import without_weights
from panda.weights.files import safetensors_weights
from panda.weights.matching import matched

TENSOR = SIDE * SIDE * 4
SLACK = 8 * 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    weights = {f"{number}.weight": torch.full((SIDE, SIDE), float(number)) for number in range(COUNT)}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("stage", "most"), [(3, COUNT * TENSOR // 2 + TENSOR), (2, COUNT * TENSOR + TENSOR)])
def test_the_peak_is_what_a_rank_keeps_and_one_tensor(folder: Path, stage: int, most: int) -> None:
    printed = run_script(TESTS / "engine/measure_placement.py", stage, folder, ranks=2, cwd=folder)
    found = [json.loads(line) for line in re.findall(r"\{[^}]*\}", printed)]  # ranks may share a line
    assert sorted(line["rank"] for line in found) == [0, 1]
    for line in found:
        assert most - 2 * TENSOR < line["kept"] <= line["peak"]
        assert line["peak"] <= most + SLACK


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 3])
def test_buffers_get_what_is_stored_and_keep_their_type(
    processes: Processes, tmp_path: Path, stage: int, precision: str
) -> None:
    stored = torch.nn.BatchNorm1d(3)
    for tensor in stored.state_dict().values():
        tensor.copy_(torch.arange(1, 1 + tensor.numel()).view(tensor.shape) * 257)
    save_file(stored.state_dict(), tmp_path / "model.safetensors")
    with without_weights():
        module = torch.nn.BatchNorm1d(3)
    config = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": False},
    }
    weights = matched(module, safetensors_weights(tmp_path), source="here")
    place(module, weights, RunOptions(zero_stage=stage, precision=precision), config, processes)
    buffers = dict(stored.named_buffers())
    assert set(buffers) == {"running_mean", "running_var", "num_batches_tracked"}
    for name, buffer in module.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name]), name
