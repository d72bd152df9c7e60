"""What is added to what, and in which type, when adapters are merged."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from panda.configuration.options import RunOptions
from panda.models.adapters.merging import merged_weights
from panda.weights.stored_tensor import StoredTensor
from panda.weights.stored_tensor import Weights


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
    config = LoraConfig(r=4, lora_alpha=8)
    merged, _ = merged_weights(
        model.to("meta"), stored(base), stored(adapters), config, RunOptions(use_lora=True), torch.device("cpu")
    )
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    change = 2 * (b.float() @ a.float())
    found = merged["0.weight"].read().to(dtype)
    assert torch.equal(found, (base["0.weight"].to(dtype).float() + change).to(dtype))
    if dtype != torch.float32:
        assert not torch.equal(found, (base["0.weight"] + change).to(dtype)), "the difference cannot be seen here"
    assert torch.equal(merged["1.weight"].read(), base["1.weight"])
