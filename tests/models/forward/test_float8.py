"""`precision: fp8`: the products of large linear layers are those of float8 numbers, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import assert_same_end
from launching import exported_weights
from launching import metrics
from launching import train_many
from launching import zero3_at_once
from transformers import GPT2Config
from transformers import GPT2LMHeadModel
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

from panda.models.forward import float8
from panda.models.forward.float8 import compute_in_float8
from panda.models.forward.float8 import converted_layers
from panda.models.forward.float8 import refuse_without_float8
from panda.registry import UserError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def rounded(values: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """``values`` in float64, as float8 of ``kind`` whose largest number is the largest of them."""
    scale = torch.finfo(kind).max / values.abs().max().double()
    return (values.double() * scale).float().to(kind).double() / scale


@pytest.mark.parametrize("rows", [[2, 24], [3, 7], [1, 1]])
@pytest.mark.parametrize("bias", [False, True])
def test_the_three_products_are_of_float8_numbers(rows: list[int], bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "SMALLEST", 32)
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(64, 32, bias=bias))])
    model.bfloat16()
    weight = model.layers[0][0].weight
    compute_in_float8(model)
    assert model.layers[0][0].weight is weight, "the optimizer has it"
    x = (torch.randn(*rows, 64) * torch.logspace(-2, 1, 64)).bfloat16().requires_grad_()
    gradient = torch.randn(*rows, 32).bfloat16() * 1e-3
    result = model.layers[0](x)
    result.backward(gradient)

    inputs, weights = rounded(x.detach(), E4M3).view(-1, 64), rounded(weight.detach(), E4M3)
    gradients = rounded(gradient, E5M2).view(-1, 32)
    expected = inputs @ weights.T + (model.layers[0][0].bias.detach().double() if bias else 0)
    for found, right in (
        (result.detach().view(-1, 32), expected),
        (x.grad.view(-1, 64), gradients @ weights),
        (weight.grad, gradients.T @ inputs),
    ):
        torch.testing.assert_close(found.double(), right, rtol=2**-7, atol=2**-7 * right.abs().max().item() / 8)


def test_large_layers_of_numbered_layers_are_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "SMALLEST", 64)
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    names = converted_layers(LlamaForCausalLM(LlamaConfig(intermediate_size=128, **sizes)))
    assert len(names) == 14 and all(name.startswith("model.layers.") for name in names)  # and not the head
    names = converted_layers(LlamaForCausalLM(LlamaConfig(intermediate_size=128, num_key_value_heads=2, **sizes)))
    assert len(names) == 10 and not any("k_proj" in name or "v_proj" in name for name in names)  # 32 outputs
    names = converted_layers(LlamaForCausalLM(LlamaConfig(intermediate_size=136, **sizes)))
    assert len(names) == 8 and not any("mlp" in name for name in names)  # 136 is no multiple of 16
    assert converted_layers(GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=128))) == []


def test_a_gpu_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, refused in {(8, 0): True, (8, 6): True, (8, 9): False, (9, 0): False, (10, 0): False}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        if refused:
            with pytest.raises(UserError, match=r"8\.9 or later, Ada or Hopper, and NVIDIA A100 has 8\.[06]\. Write"):
                refuse_without_float8(torch.device("cuda", 0))
        else:
            refuse_without_float8(torch.device("cuda", 0))
    refuse_without_float8(torch.device("cpu"))


SMALL = """
from dataclasses import dataclass
from panda.models.forward import float8
from panda.registry import register_plugin
float8.SMALLEST = 32

@dataclass(frozen=True)
class SmallOptions:
    pass

@register_plugin("small-float8", options=SmallOptions)
class Small:
    acts = False
    def __init__(self, options, context):
        pass
"""


def test_whole_runs_in_float8(tmp_path: Path) -> None:
    """Stages, ranks, recomputation and compilation; the course is near that in bf16, and not the same."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "small.py").write_text(SMALL)
    (tmp_path / "rows.json").write_text(json.dumps([{"input": "x" * (i % 9 + 1), "target": "yes"} for i in range(64)]))
    shape = "--arch llama-tiny --num_layers 2 --hidden_size 64 --intermediate_size 96 --num_heads 4"
    common = f"--task instruct --instruction_tuning_data_dir rows.json {shape} --num_key_value_heads 2 --max_steps 6"
    common += " --learning_rate 1e-2 --user_dir parts --plugins small-float8 --gradient_accumulation_steps 2"
    ways: dict[str, list[object]] = {
        "bf16": ["--precision", "bf16"],
        "fp8": ["--precision", "fp8"],
        "again": ["--precision", "fp8", "--activation_checkpointing", "selective"],
        "compiled": ["--precision", "fp8", "--compile", "true"],
        "zero3": ["--precision", "fp8", *zero3_at_once(tmp_path)],
    }
    said = train_many(
        [[*common.split(), *way, "--output_dir", name] for name, way in ways.items()], ranks=2, cwd=tmp_path
    )
    assert "fp8, ZeRO stage 1" in said
    losses = {name: [record["loss"] for record in metrics(tmp_path / name) if "loss" in record] for name in ways}
    assert losses["fp8"] != losses["bf16"]
    for name in ways:
        assert losses[name] == pytest.approx(losses["bf16"], rel=0.05), name
    assert losses["fp8"][-1] < losses["fp8"][0] - 0.5
    assert_same_end(tmp_path / "fp8", tmp_path / "again", after=0)
    assert losses["zero3"] == pytest.approx(losses["fp8"], rel=1e-3)
    weights = {name: exported_weights(tmp_path / name) for name in ("bf16", "fp8")}
    kinds = {name: {key: (each.shape, each.dtype) for key, each in found.items()} for name, found in weights.items()}
    assert kinds["fp8"] == kinds["bf16"]
