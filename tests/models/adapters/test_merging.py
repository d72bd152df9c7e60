"""What is added to what, and in which type, when adapters are merged."""

from __future__ import annotations

import copy

import pytest
import torch
from model_types import ENTRIES
from model_types import tiny

from panda.configuration.options import RunOptions
from panda.models.adapters.experts import ends_of_experts
from panda.models.adapters.lora import add_adapters
from panda.models.adapters.merging import merged_weights
from panda.registry import UserError
from panda.weights.stored_tensor import StoredTensor
from panda.weights.stored_tensor import Weights
from panda.weights.stored_tensor import weights_of


def stored(tensors: dict[str, torch.Tensor]) -> Weights:
    return {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_are_added_to_the_base_as_training_had_it(dtype: torch.dtype) -> None:
    """That is rounded to the type of training; the adapters were learned on it, errors of rounding included."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 24, bias=False), torch.nn.Linear(24, 4))
    base = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    a, b = torch.randn(4, 32).to(dtype), torch.randn(24, 4).to(dtype)
    adapters = {f"base_model.model.0.lora_{letter}.default.weight": tensor for letter, tensor in (("A", a), ("B", b))}
    options = RunOptions(use_lora=True, lora_r=4, lora_alpha=8, lora_target_modules=("0",))
    merged, _ = merged_weights(model.to("meta"), stored(base), stored(adapters), options, torch.device("cpu"))
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    change = 2 * (b.float() @ a.float())
    found = merged["0.weight"].read().to(dtype)
    assert torch.equal(found, (base["0.weight"].to(dtype).float() + change).to(dtype))
    if dtype != torch.float32:
        assert not torch.equal(found, (base["0.weight"] + change).to(dtype)), "the difference cannot be seen here"
    assert torch.equal(merged["1.weight"].read(), base["1.weight"])


@pytest.mark.parametrize("targets", ["all", "experts", "one of the experts' weights"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "jetmoe"])
def test_adapters_on_experts_are_added_as_peft_applies_them(model_type: str, targets: str) -> None:
    """Experts of one parameter or two, as [columns, rows] in gpt_oss; with all layers, routers have adapters too."""
    base = tiny(model_type).eval()
    named = {"all": [], "experts": ends_of_experts(base)}.get(targets, ends_of_experts(base)[:1])
    options = RunOptions(use_lora=True, lora_r=2, lora_target_modules=tuple(named))
    adapted = add_adapters(copy.deepcopy(base), options).eval()
    torch.manual_seed(0)
    trained = {name: torch.randn(p.shape) * 0.2 for name, p in adapted.named_parameters() if p.requires_grad}
    adapted.load_state_dict(trained, strict=False)
    outline = copy.deepcopy(base).to("meta")
    merged, _ = merged_weights(outline, weights_of(base), stored(trained), options, torch.device("cpu"))
    plain = copy.deepcopy(base)
    plain.load_state_dict({name: tensor.read() for name, tensor in merged.items()}, strict=False)  # a head may be tied
    ids = torch.arange(24).view(2, 12) * 7 % ENTRIES
    with torch.no_grad():
        expected, before, found = (model(input_ids=ids).logits for model in (adapted, base, plain))
    assert (found - expected).abs().max() < 1e-4
    assert (before - expected).abs().max() > 0.1


def test_adapters_on_other_layers_than_the_configuration_says_are_not_merged() -> None:
    """As where another version of peft has trained them, with other layers by default."""
    base = tiny("mixtral")
    options = RunOptions(use_lora=True, lora_target_modules=("q_proj",))
    adapted = add_adapters(copy.deepcopy(base), options)
    trained = {name: p.detach() for name, p in adapted.named_parameters() if p.requires_grad}
    other = RunOptions(use_lora=True, lora_target_modules=("q_proj", "v_proj"))
    with pytest.raises(UserError, match=r"--merge: only one of .* has base_model\.model\.model\.layers\.0\..*v_proj"):
        merged_weights(base, weights_of(base), stored(trained), other, torch.device("cpu"))
