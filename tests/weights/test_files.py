"""Weights written to files: in shards, whole, and only if they are finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from panda.registry import UserError
from panda.weights.files import safetensors_weights
from panda.weights.files import write_weights
from panda.weights.stored_tensor import StoredTensor


def test_weights_are_written_in_shards_that_plain_transformers_loads(tmp_path: Path) -> None:
    model: Any = llama()
    model.config.save_pretrained(tmp_path)
    weights = {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, tensor.detach)
        for name, tensor in model.named_parameters()
    }
    write_weights(weights, tmp_path, shard_bytes=20_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 4
    biggest = max(parameter.numel() * 4 for parameter in model.parameters())
    assert all(file.stat().st_size < max(biggest, 20_000) + 2_000 for file in files)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    weights = {
        name: StoredTensor((2,), torch.float32, lambda v=value: torch.tensor([0.0, v]))
        for name, value in (("a", 1.0), ("b", float("nan")))
    }
    with pytest.raises(UserError, match="1 tensor is not finite, b first"):
        write_weights(weights, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_share_memory_are_each_written_whole(tmp_path: Path) -> None:
    """As those of tied layers in a pickle, and parts of one buffer."""
    whole = torch.arange(6.0)
    tensors = {"a": whole, "b": whole, "first": whole[:2], "last": whole[2:], "columns": whole.view(2, 3)[:, 1:]}
    weights = {name: StoredTensor(tuple(tensor.shape), tensor.dtype, tensor.detach) for name, tensor in tensors.items()}
    write_weights(weights, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)


def test_tensors_are_held_for_one_file_at_a_time(tmp_path: Path) -> None:
    seen: list[tuple[str, list[str]]] = []

    def read(name: str) -> torch.Tensor:
        seen.append((name, sorted(file.name for file in tmp_path.glob("*.safetensors"))))
        return torch.zeros(4)

    weights = {name: StoredTensor((4,), torch.float32, lambda name=name: read(name)) for name in "abcd"}
    write_weights(weights, tmp_path, shard_bytes=32)
    first = "model-00001-of-00002.safetensors"
    assert seen == [("a", []), ("b", []), ("c", [first]), ("d", [first])]
    assert list(safetensors_weights(tmp_path)) == ["a", "b", "c", "d"]
