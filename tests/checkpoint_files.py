"""Tiny checkpoints in the real file formats: Hugging Face's, Meta's original, PandaLLM's deltas."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig
from transformers import LlamaForCausalLM

from panda.registry.location import resolve_path

SHAPE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def llama(seed: int = 5, **changes: Any) -> Any:
    """A LLaMA whose weights are far enough from zero that each of them matters."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def qwen3_moe() -> Any:
    """A mixture of experts of two layers, in plain transformers."""
    torch.manual_seed(5)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes, **experts, **heads))


def add_tokenizer(folder: Path) -> Path:
    """Put the byte tokenizer, of 259 entries, beside the weights in ``folder``."""
    for file in resolve_path("panda:data/sample/tokenizer").iterdir():
        shutil.copy(file, folder / file.name)
    return folder


def save_hf(model: Any, folder: Path, *, shards: bool = True) -> Path:
    """``model`` as transformers saves it, in several shards with an index, and a tokenizer."""
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == shards
    return add_tokenizer(folder)


def save_pickle(model: Any, folder: Path) -> Path:
    """``model`` as older versions of transformers saved it: one pickle."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return add_tokenizer(folder)


def _unpermuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def save_meta(model: Any, folder: Path, *, ranks: int = 2, split_vocabulary: bool = False) -> Path:
    """``model`` in Meta's format, spread over ``ranks``; ``split_vocabulary`` as Llama 3's embedding is."""
    config = model.config
    folder.mkdir(parents=True)
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": config.intermediate_size,  # 2/3 of 4 * dim, rounded up to a multiple of this
        "ffn_dim_multiplier": 0.5,
        "norm_eps": config.rms_norm_eps,
    }
    (folder / "params.json").write_text(json.dumps(params))
    state = model.state_dict()
    whole = {
        "tok_embeddings.weight": (state["model.embed_tokens.weight"], 0 if split_vocabulary else 1),
        "norm.weight": (state["model.norm.weight"], None),
        "output.weight": (state["lm_head.weight"], 0),
    }
    for layer in range(config.num_hidden_layers):
        old, new = f"model.layers.{layer}.", f"layers.{layer}."
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        whole |= {
            f"{new}attention.wq.weight": (_unpermuted(state[f"{old}self_attn.q_proj.weight"], heads), 0),
            f"{new}attention.wk.weight": (_unpermuted(state[f"{old}self_attn.k_proj.weight"], kv_heads), 0),
            f"{new}attention.wv.weight": (state[f"{old}self_attn.v_proj.weight"], 0),
            f"{new}attention.wo.weight": (state[f"{old}self_attn.o_proj.weight"], 1),
            f"{new}feed_forward.w1.weight": (state[f"{old}mlp.gate_proj.weight"], 0),
            f"{new}feed_forward.w2.weight": (state[f"{old}mlp.down_proj.weight"], 1),
            f"{new}feed_forward.w3.weight": (state[f"{old}mlp.up_proj.weight"], 0),
            f"{new}attention_norm.weight": (state[f"{old}input_layernorm.weight"], None),
            f"{new}ffn_norm.weight": (state[f"{old}post_attention_layernorm.weight"], None),
        }
    for rank in range(ranks):
        shard = {
            name: (weight if axis is None else weight.chunk(ranks, axis)[rank]).clone()
            for name, (weight, axis) in whole.items()
        }
        shard["rope.freqs"] = torch.ones(4)
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    return add_tokenizer(folder)


def save_delta(target: Any, base: Any, folder: Path) -> Path:
    """``target - base`` by PandaLLM's make_delta: every tensor is subtracted but the embedding and the output head."""
    save_hf(target, folder, shards=False)
    theirs = base.state_dict()
    state = load_file(folder / "model.safetensors")
    for name in state:
        if "embed_tokens" not in name and "lm_head" not in name:
            state[name] = state[name] - theirs[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
