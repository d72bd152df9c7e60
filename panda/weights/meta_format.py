"""Meta's original format of LLaMA: params.json and consolidated.NN.pth, one for each model-parallel rank."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from panda.registry import UserError

if TYPE_CHECKING:
    import torch

    from panda.weights.stored_tensor import Weights

PARAMS, SHARDS = "params.json", "consolidated.*.pth"

_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
"""Meta's names of tensors, those of a layer without ``layers.N.``, and the corresponding names of transformers."""

_SPLIT_BY_COLUMN = ("attention.wo.weight", "feed_forward.w2.weight")
_REPLICATED = ("norm.weight", "attention_norm.weight", "ffn_norm.weight")


def meta_config(folder: Path) -> dict[str, Any]:
    """The content of a config.json, from the params.json in ``folder``, which does not state a number of positions.

    Raises UserError where that is missing a parameter of a LLaMA.
    """
    file = folder / PARAMS
    try:
        params = json.loads(file.read_text(encoding="utf-8"))
        hidden, heads = params["dim"], params["n_heads"]
        multiple = params["multiple_of"]
        intermediate = int((params.get("ffn_dim_multiplier") or 1) * int(8 * hidden / 3))
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": params["vocab_size"] if params.get("vocab_size", -1) > 0 else 32000,
            "hidden_size": hidden,
            "intermediate_size": multiple * -(-intermediate // multiple),
            "num_hidden_layers": params["n_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": params.get("n_kv_heads") or heads,
            "rms_norm_eps": params["norm_eps"],
            "rope_theta": float(params.get("rope_theta", 10000.0)),
        }
    except (ValueError, KeyError, TypeError, RecursionError) as problem:
        raise UserError(f"{file}: not the parameters of a LLaMA: {problem!r}.") from None
    if params.get("use_scaled_rope"):  # Llama 3.1, and the small models of 3.2; the constants are in Meta's code
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": 8.0 if hidden >= 4096 else 32.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    return config


def meta_weights(folder: Path) -> Weights:
    """The tensors of a LLaMA under transformers' names, the parts of all ranks joined. Raises UserError for others.

    The rows of the projections of queries and keys are reordered: Meta's rotary embedding rotates neighbouring
    elements of a head, that of transformers its two halves.
    """
    from panda.weights.files import load_pickle
    from panda.weights.stored_tensor import StoredTensor

    config = meta_config(folder)
    files = sorted(folder.glob(SHARDS))
    numbers = [int(file.name.split(".")[1]) for file in files]
    if numbers != list(range(len(numbers))):
        raise UserError(f"{folder}: parts are missing: it only has {', '.join(file.name for file in files)}.")
    ranks = [load_pickle(file) for file in files]
    weights: dict[str, StoredTensor] = {}
    for name, first in ranks[0].items():
        if name == "rope.freqs":
            continue
        layer = re.fullmatch(r"(layers\.\d+)\.(.+)", name)
        known = layer.group(2) if layer else name
        if known not in _NAMES:
            raise UserError(f"{files[0]}: {name!r} is not the name of a tensor of a LLaMA.")
        absent = [file.name for file, state in zip(files, ranks, strict=True) if name not in state]
        if absent:
            raise UserError(f"{folder}: {name!r} is in {files[0].name}, and missing from {', '.join(absent)}.")
        parts = [state[name] for state in ranks]
        heads = {
            "attention.wq.weight": config["num_attention_heads"],
            "attention.wk.weight": config["num_key_value_heads"],
        }.get(known)
        axis = _split_axis(known, first, config["hidden_size"])
        shape = list(first.shape)
        if axis is not None:
            shape[axis] = sum(part.shape[axis] for part in parts)
        target = f"model.{layer.group(1)}.{_NAMES[known]}" if layer else _NAMES[known]
        weights[target] = StoredTensor(tuple(shape), first.dtype, partial(_joined, parts, axis, heads))
    return weights


def _split_axis(name: str, part: torch.Tensor, hidden_size: int) -> int | None:
    if name in _REPLICATED:
        return None
    if name == "tok_embeddings.weight":  # split by width before Llama 3, by vocabulary since
        return 0 if part.shape[1] == hidden_size else 1
    return 1 if name in _SPLIT_BY_COLUMN else 0


def _joined(parts: list[torch.Tensor], axis: int | None, heads: int | None) -> torch.Tensor:
    import torch

    whole = parts[0] if axis is None or len(parts) == 1 else torch.cat(parts, axis)
    if heads is not None:
        rows, columns = whole.shape
        whole = whole.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
    return whole
