"""Checkpoints that contradict themselves, and what older and newer programs write into them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import add_tokenizer
from checkpoint_files import llama
from checkpoint_files import save_hf
from safetensors.torch import load_file
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers import AutoModelForCausalLM
from transformers import GPT2Config
from transformers import GPTBigCodeConfig
from transformers import Mamba2Config

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.registry import UserError
from panda.run.preparation import Preparation
from panda.weights.json_object import read_json_object
from panda.weights.json_object import write_json_object


def prepared(folder: Path, *more: object) -> Preparation:
    flags = ["--ckpt_path", folder, "--instruction_tuning_data_dir", "panda:data/sample/instruct", *more]
    return Preparation(configure(parse_arguments([str(word) for word in flags])))


def spoil(folder: Path, changes: dict[str, torch.Tensor]) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | changes, folder / "model.safetensors", metadata={"format": "pt"})


def state(preparation: Preparation) -> dict[str, torch.Tensor]:
    assert preparation.weights is not None
    return {name: stored.read() for name, stored in preparation.weights.items()}


def test_a_head_of_its_own_beside_a_configuration_that_ties_it_is_an_error(tmp_path: Path) -> None:
    folder = save_hf(llama(tie_word_embeddings=True), tmp_path / "tied", shards=False)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    spoil(folder, {"lm_head.weight": embedding.clone()})
    assert "lm_head.weight" not in state(prepared(folder)), "the same numbers twice are one tensor"
    spoil(folder, {"lm_head.weight": embedding + 1})
    with pytest.raises(UserError, match=r'model.embed_tokens.weight and lm_head.weight .*"tie_word_embeddings": false'):
        state(prepared(folder))


def test_buffers_of_older_programs_are_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    folder = save_hf(AutoModelForCausalLM.from_config(config), tmp_path / "gpt2", shards=False)
    mask = torch.ones(1, 1, 32, 32, dtype=torch.uint8).tril()
    spoil(folder, {"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)})
    assert not any("masked" in name or name.endswith(".attn.bias") for name in state(prepared(folder)))
    folder = save_hf(llama(), tmp_path / "llama", shards=False)
    spoil(
        folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "model.layers.0.attention.bias": mask}
    )
    assert len(state(prepared(folder))) == 21
    spoil(folder, {"model.layers.0.self_attn.bias": torch.ones(32)})
    with pytest.raises(UserError, match=r"in it and not in the model: model.layers.0.self_attn.bias"):
        state(prepared(folder))


def test_masks_of_any_number_of_dimensions_are_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPTBigCodeConfig(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    folder = save_hf(AutoModelForCausalLM.from_config(config), tmp_path / "bigcode", shards=False)
    spoil(folder, {"transformer.h.0.attn.bias": torch.ones(32, 32, dtype=torch.bool).tril()})
    assert "transformer.h.0.attn.bias" not in state(prepared(folder))
    spoil(folder, {"transformer.h.0.attn.bias": torch.ones(32)})
    with pytest.raises(UserError, match=r"in it and not in the model: transformer\.h\.0\.attn\.bias"):
        state(prepared(folder))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "_orig_mod."),
        ("", "module."),
        ("", "module._orig_mod."),
        ("layers.0.", "layers.0._orig_mod."),
        ("layers.1.mlp.", "layers.1._checkpoint_wrapped_module.mlp."),
        ("model.", "_fsdp_wrapped_module.model._fsdp_wrapped_module."),
    ],
)
def test_names_lose_what_wrappers_of_torch_add(tmp_path: Path, old: str, new: str) -> None:
    model = llama()
    folder = save_hf(model, tmp_path / "wrapped", shards=False)
    stored = load_file(folder / "model.safetensors")
    renamed = {new + name if not old else name.replace(old, new, 1): tensor for name, tensor in stored.items()}
    assert renamed.keys() != stored.keys()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    read = state(prepared(folder))
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())


def test_no_quantisation_can_be_written_as_null(tmp_path: Path) -> None:
    folder = save_hf(llama(), tmp_path / "null", shards=False)
    file = folder / "config.json"
    write_json_object(file, read_json_object(file) | {"quantization_config": None})
    assert state(prepared(folder))


def test_a_padding_token_beyond_the_embedding_is_an_error_with_what_to_write(tmp_path: Path) -> None:
    folder = save_hf(llama(), tmp_path / "padded", shards=False)
    file = folder / "config.json"
    write_json_object(file, read_json_object(file) | {"pad_token_id": 259})
    with pytest.raises(UserError, match=r'pad_token_id is 259, .* has 259 rows. Write `"pad_token_id": null`'):
        state(prepared(folder))
    write_json_object(file, read_json_object(file) | {"pad_token_id": -1})  # as in the first conversions of LLaMA
    assert state(prepared(folder))


def test_infinity_is_read_as_transformers_writes_it_and_written_for_all_its_versions(tmp_path: Path) -> None:
    config = Mamba2Config(
        vocab_size=259,
        hidden_size=16,
        num_hidden_layers=1,
        num_heads=4,
        head_dim=8,
        state_size=4,
        n_groups=1,
        time_step_limit=(0.5, math.inf),
    )
    folder = tmp_path / "mamba"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    add_tokenizer(folder)
    assert "__float__" in (folder / "config.json").read_text()
    outline: Any = prepared(folder, "--max_seq_length", "32").outline
    assert tuple(outline.config.time_step_limit) == (0.5, math.inf)
    write_json_object(tmp_path / "config.json", read_json_object(folder / "config.json"))
    assert "__float__" not in (tmp_path / "config.json").read_text(), "4.57 does not read it"
    assert tuple(AutoConfig.from_pretrained(tmp_path / "config.json").time_step_limit) == (0.5, math.inf)
    (tmp_path / "plain.json").write_text('{"low": -Infinity, "none": NaN}')
    found = read_json_object(tmp_path / "plain.json")
    assert found["low"] == -math.inf and math.isnan(found["none"])


# -- two sets of weights in one folder -----------------------------------------------------------


def test_an_index_and_a_single_file_that_it_does_not_list_are_two_sets(tmp_path: Path) -> None:
    folder = save_hf(llama(), tmp_path / "both")
    save_file(llama(2).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"two sets of weights: model.safetensors, and the files that .*index.json"):
        state(prepared(folder))


def test_files_without_an_index_that_have_a_tensor_twice_are_two_sets(tmp_path: Path) -> None:
    folder = save_hf(llama(), tmp_path / "both", shards=False)
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    save_file(llama(2).state_dict(), folder / "two.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"several of its files have a tensor .*, two.safetensors among them"):
        state(prepared(folder))


def test_numbered_files_without_an_index_have_to_be_complete(tmp_path: Path) -> None:
    folder = save_hf(llama(), tmp_path / "sharded")
    (folder / "model.safetensors.index.json").unlink()
    assert len(state(prepared(folder))) == 21
    lost = sorted(folder.glob("model-*"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=rf"files of weights are missing: {lost.name}\. Fetch"):
        state(prepared(folder))


def test_pickles_beside_safetensors_are_left_aside_and_a_line_says_so(tmp_path: Path) -> None:
    folder = save_hf(llama(), tmp_path / "both", shards=False)
    torch.save(llama(2).state_dict(), folder / "pytorch_model.bin")
    preparation = prepared(folder)
    assert preparation.pretrained is not None
    assert preparation.pretrained.describe().endswith("safetensors, llama (pytorch_model.bin not read)")
    assert torch.equal(state(preparation)["lm_head.weight"], llama().lm_head.weight)


def test_adapters_beside_a_model_are_two_sets(tmp_path: Path) -> None:
    folder = save_hf(llama(), tmp_path / "both", shards=False)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"two sets of weights: a model, and adapters"):
        prepared(folder)
