"""The identity of weights: every tensor counts, and how they are spread over files does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import llama
from checkpoint_files import save_hf
from checkpoint_files import save_meta
from checkpoint_files import save_pickle
from safetensors.torch import load_file
from safetensors.torch import save_file

from panda.registry import UserError
from panda.weights.finding import Source
from panda.weights.finding import pretrained_at
from panda.weights.identity import identity_of

LARGE = 2**20


def identity_at(folder: Path) -> str:
    return pretrained_at(Source(str(folder), "ckpt_path", allow_pickle=True)).identity


def saved(tensors: dict[str, torch.Tensor], file: Path) -> str:
    save_file(tensors, file)
    return identity_of([file])


def test_every_element_of_small_tensors_and_every_large_tensor_counts(tmp_path: Path) -> None:
    """One small tensor among large ones is what sampling a file by its bytes passes over."""
    file = tmp_path / "model.safetensors"
    tensors = {f"layers.{layer}.weight": torch.zeros(LARGE) for layer in range(4)}
    tensors |= {f"layers.{layer}.norm": torch.ones(64) for layer in range(4)}
    found = {saved(tensors, file)}
    changes = [(f"layers.{layer}.norm", place) for layer in range(4) for place in (0, 31, 63)]
    changes += [(f"layers.{layer}.weight", place) for layer in range(4) for place in (0, LARGE - 1)]
    changes += [("layers.2.weight", slice(None))]
    for name, place in changes:
        before = tensors[name].clone()
        tensors[name][place] += 1
        found.add(saved(tensors, file))
        tensors[name] = before
    assert len(found) == 1 + len(changes)
    assert saved(tensors, file) in found


def test_names_types_and_shapes_count(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    zeros = torch.zeros(4, 4)
    others = [{"a": zeros}, {"b": zeros}, {"a": zeros.view(2, 8)}, {"a": zeros.int()}, {"a": zeros, "b": zeros.clone()}]
    assert len({saved(tensors, file) for tensors in others}) == len(others)


def test_the_same_tensors_in_other_files_are_the_same_weights(tmp_path: Path) -> None:
    model = llama()
    sharded, single = save_hf(model, tmp_path / "a"), save_hf(model, tmp_path / "b", shards=False)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert identity_at(sharded) == identity_at(single) != identity_at(save_hf(llama(6), tmp_path / "c"))
    save_file(load_file(single / "model.safetensors"), single / "consolidated.safetensors")
    assert identity_at(single) == identity_at(sharded), "what is not read does not count"


@pytest.mark.parametrize("save", [save_pickle, save_meta])
def test_every_tensor_of_a_pickle_counts(tmp_path: Path, save: Any) -> None:
    model = llama()
    found = {identity_at(save(model, tmp_path / "first"))}
    assert identity_at(save(model, tmp_path / "again")) in found
    parameters = dict(model.named_parameters())
    for number, parameter in enumerate(parameters.values()):
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
        found.add(identity_at(save(model, tmp_path / f"{number}")))
    assert len(found) == 1 + len(parameters)


def test_the_identity_of_a_checkpoint_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained = pretrained_at(Source(str(save_hf(llama(), tmp_path / "model")), "ckpt_path"))
    found = pretrained.identity
    monkeypatch.setattr("panda.weights.pretrained.identity_of", None)
    assert pretrained.identity == found


def test_a_file_that_is_cut_off_or_missing_is_told_and_is_no_other_base(tmp_path: Path) -> None:
    folder = save_hf(llama(), tmp_path / "model")
    file = sorted(folder.glob("*.safetensors"))[1]
    content = file.read_bytes()
    for cut in (content[:-10], content[:20], b"", json.dumps({}).encode()):
        file.write_bytes(cut)
        with pytest.raises(UserError, match=f"{file.name}: damaged, or not safetensors: .*Fetch it again"):
            identity_at(folder)
    file.unlink()
    with pytest.raises(UserError, match=f"files of weights are missing, .*: {file.name}"):
        identity_at(folder)
