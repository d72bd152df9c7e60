"""Parts that a task gave the model, which are trained whole beside the adapters: merged, exported, and left out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from model_types import tiny

from panda.configuration.options import RunOptions
from panda.models.adapters.lora import add_adapters
from panda.models.adapters.lora import load_adapters
from panda.models.adapters.lora import put_adapters
from panda.models.adapters.lora import stand_in_for_parts
from panda.models.adapters.merging import merged_weights
from panda.weights.stored_tensor import StoredTensor
from panda.weights.stored_tensor import Weights
from panda.weights.stored_tensor import weights_of

OPTIONS = RunOptions(use_lora=True, lora_r=2)
IDS = torch.arange(12).view(1, 12)


@pytest.fixture
def base() -> Any:
    return tiny("llama").eval()


@pytest.fixture
def adapted(base: Any) -> Any:
    """``base`` with adapters and a head of two layers, all drawn."""
    model: Any = copy.deepcopy(base)
    width = model.config.hidden_size
    model.score = torch.nn.Sequential(torch.nn.Linear(width, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1, bias=False))
    model.new_parts = ("score",)
    found: Any = add_adapters(model, OPTIONS).eval()
    torch.manual_seed(0)
    for parameter in found.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.1
    return found


def trained(adapted: Any) -> Weights:
    found = {name: p.detach() for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("score" in name for name in found)
    return {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in found.items()
    }


def test_a_part_is_merged_under_its_own_name(base: Any, adapted: Any) -> None:
    """Under another one whoever loads the model would draw the part, and say nothing."""
    merged, _ = merged_weights(base, weights_of(base), trained(adapted), OPTIONS, torch.device("cpu"))
    assert merged.keys() - weights_of(base).keys() == {"score.0.weight", "score.0.bias", "score.2.weight"}
    bias = adapted.get_parameter("base_model.model.score.modules_to_save.default.0.bias")
    assert torch.equal(merged["score.0.bias"].read(), bias)


def saved(model: Any, weights: Weights, folder: Path) -> Path:
    state = {name: tensor.read() for name, tensor in weights.items()}
    model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    return folder


def test_a_checkpoint_is_exported_as_at_the_end_of_the_run(base: Any, adapted: Any, tmp_path: Path) -> None:
    """Without the task, which made the part: peft would not read a part that its configuration does not name."""
    weights = trained(adapted)
    again = copy.deepcopy(base)
    stand_in_for_parts(again, weights)
    files = [
        saved(model, weights, tmp_path / name)
        for name, model in (("run", adapted), ("export", add_adapters(again, OPTIONS)))
    ]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert len({(folder / name).read_bytes() for folder in files}) == 1, name
    config = adapted.peft_config["default"]
    assert config.modules_to_save == ["score"] and not config.exclude_modules
    assert config.task_type is None, "peft could not put them on a classifier"
    assert not [name for name in config.target_modules if "score" in name]


def test_answers_leave_parts_out(base: Any, adapted: Any, tmp_path: Path) -> None:
    """From a checkpoint, and from an export."""
    expected = adapted(input_ids=IDS).logits
    of_checkpoint = add_adapters(copy.deepcopy(base), OPTIONS).eval()
    put_adapters(of_checkpoint, trained(adapted), torch.device("cpu"))
    assert torch.allclose(of_checkpoint(input_ids=IDS).logits, expected, atol=1e-6)
    of_export = load_adapters(copy.deepcopy(base), saved(adapted, trained(adapted), tmp_path)).eval()
    assert torch.allclose(of_export(input_ids=IDS).logits, expected, atol=1e-6)
    assert not torch.allclose(base(input_ids=IDS).logits, expected, atol=1e-3)
