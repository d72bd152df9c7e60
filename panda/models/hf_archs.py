"""Named shapes of published models, as values of HfOptions. Those that are LLaMAs are in llama_archs.py.

Each is the config.json that its authors publish, where that differs from what transformers assumes for the type.
"""

from __future__ import annotations

import json
from typing import Any

from panda.registry import register_arch


def _shape(model_type: str, **values: Any) -> dict[str, Any]:
    return {"hf_model_type": model_type, "hf_shape": tuple(f"{name}={json.dumps(v)}" for name, v in values.items())}


def _qwen3(hidden_size: int, layers: int, heads: int, intermediate_size: int, *, tied: bool = False) -> dict[str, Any]:
    return _shape(
        "qwen3",
        vocab_size=151936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
    )


@register_arch("qwen3-0.6b", model="hf")
def qwen3_0_6b() -> dict[str, Any]:
    """Qwen3 0.6B (arXiv 2505.09388)."""
    return _qwen3(1024, 28, 16, 3072, tied=True)


@register_arch("qwen3-1.7b", model="hf")
def qwen3_1_7b() -> dict[str, Any]:
    """Qwen3 1.7B."""
    return _qwen3(2048, 28, 16, 6144, tied=True)


@register_arch("qwen3-4b", model="hf")
def qwen3_4b() -> dict[str, Any]:
    """Qwen3 4B."""
    return _qwen3(2560, 36, 32, 9728, tied=True)


@register_arch("qwen3-8b", model="hf")
def qwen3_8b() -> dict[str, Any]:
    """Qwen3 8B."""
    return _qwen3(4096, 36, 32, 12288)


@register_arch("qwen3-14b", model="hf")
def qwen3_14b() -> dict[str, Any]:
    """Qwen3 14B."""
    return _qwen3(5120, 40, 40, 17408)


@register_arch("qwen3-32b", model="hf")
def qwen3_32b() -> dict[str, Any]:
    """Qwen3 32B."""
    return _qwen3(5120, 64, 64, 25600)


@register_arch("qwen3-30b-a3b", model="hf")
def qwen3_30b_a3b() -> dict[str, Any]:
    """Qwen3 30B-A3B, a mixture of 128 experts of which a token uses 8, with its router loss."""
    return _shape(
        "qwen3_moe",
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    ) | {"router_aux_loss_coef": 0.001}


@register_arch("mistral-7b", model="hf")
def mistral_7b() -> dict[str, Any]:
    """Mistral 7B v0.3 (arXiv 2310.06825)."""
    return _shape(
        "mistral",
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        rms_norm_eps=1e-5,
        sliding_window=None,
    )


def _gemma3(
    hidden_size: int, layers: int, heads: tuple[int, int], intermediate_size: int, **values: Any
) -> dict[str, Any]:
    """``heads``: those of attention, and of keys and values."""
    common: dict[str, Any] = {
        "vocab_size": 262144,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "max_position_embeddings": 32768,
        "rope_parameters": _gemma3_rope({"rope_type": "default"}),
        "tie_word_embeddings": True,
    }
    return _shape("gemma3_text", **common | values)


def _gemma3_rope(full: dict[str, Any]) -> dict[str, Any]:
    return {
        "full_attention": full | {"rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }


@register_arch("gemma3-270m", model="hf")
def gemma3_270m() -> dict[str, Any]:
    """Gemma 3 270M (arXiv 2503.19786)."""
    return _gemma3(640, 18, (4, 1), 2048)


@register_arch("gemma3-1b", model="hf")
def gemma3_1b() -> dict[str, Any]:
    """Gemma 3 1B."""
    return _gemma3(1152, 26, (4, 1), 6912)


@register_arch("gemma3-4b", model="hf")
def gemma3_4b() -> dict[str, Any]:
    """The language model of Gemma 3 4B, without its vision tower."""
    rope = _gemma3_rope({"rope_type": "linear", "factor": 8.0})
    return _gemma3(
        2560,
        34,
        (8, 4),
        10240,
        vocab_size=262208,
        sliding_window=1024,
        max_position_embeddings=131072,
        rope_parameters=rope,
    )
