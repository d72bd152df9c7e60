"""The named sizes of the LLaMA family, as values of LlamaOptions."""

from __future__ import annotations

from typing import Any

from panda.registry import register_arch


def _llama(hidden_size: int, num_layers: int, num_heads: int, intermediate_size: int) -> dict[str, Any]:
    return {
        "vocab_size": 32000,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "intermediate_size": intermediate_size,
    }


@register_arch("llama-tiny", model="llama")
def llama_tiny() -> dict[str, Any]:
    """Learns on two CPU cores in a minute; its vocabulary is the tokenizer's."""
    return {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "intermediate_size": 256}


@register_arch("llama-125m", model="llama")
def llama_125m() -> dict[str, Any]:
    """The shape of GPT-2 small and OPT-125M, as a LLaMA: 134 million parameters."""
    return _llama(768, 12, 12, 2048)


@register_arch("llama-1.3b", model="llama")
def llama_1_3b() -> dict[str, Any]:
    """The shape of Sheared-LLaMA-1.3B (arXiv 2310.06694)."""
    return _llama(2048, 24, 16, 5504)


@register_arch("llama-7b", model="llama")
def llama_7b() -> dict[str, Any]:
    """LLaMA-7B."""
    return _llama(4096, 32, 32, 11008)


@register_arch("llama-13b", model="llama")
def llama_13b() -> dict[str, Any]:
    """LLaMA-13B."""
    return _llama(5120, 40, 40, 13824)


@register_arch("llama-33b", model="llama", aliases=("llama-30b",))
def llama_33b() -> dict[str, Any]:
    """LLaMA-33B, which some call 30B."""
    return _llama(6656, 60, 52, 17920)


@register_arch("llama-65b", model="llama")
def llama_65b() -> dict[str, Any]:
    """LLaMA-65B."""
    return _llama(8192, 80, 64, 22016)


_LLAMA2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_LLAMA3 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}


@register_arch("llama2-7b", model="llama")
def llama2_7b() -> dict[str, Any]:
    """Llama 2 7B (arXiv 2307.09288)."""
    return _llama(4096, 32, 32, 11008) | _LLAMA2


@register_arch("llama2-13b", model="llama")
def llama2_13b() -> dict[str, Any]:
    """Llama 2 13B."""
    return _llama(5120, 40, 40, 13824) | _LLAMA2


@register_arch("llama2-70b", model="llama")
def llama2_70b() -> dict[str, Any]:
    """Llama 2 70B, with eight heads of keys and values."""
    return _llama(8192, 80, 64, 28672) | _LLAMA2 | {"num_key_value_heads": 8}


@register_arch("llama3-8b", model="llama")
def llama3_8b() -> dict[str, Any]:
    """Llama 3 8B (arXiv 2407.21783)."""
    return _llama(4096, 32, 32, 14336) | _LLAMA3


@register_arch("llama3-70b", model="llama")
def llama3_70b() -> dict[str, Any]:
    """Llama 3 70B."""
    return _llama(8192, 80, 64, 28672) | _LLAMA3


_LLAMA3_2 = _LLAMA3 | {
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "rope_scaling": "llama3",
    "rope_scaling_factor": 32.0,
    "rope_original_max_position_embeddings": 8192,
}


@register_arch("llama3.2-1b", model="llama")
def llama3_2_1b() -> dict[str, Any]:
    """Llama 3.2 1B."""
    return _llama(2048, 16, 32, 8192) | _LLAMA3_2


@register_arch("llama3.2-3b", model="llama")
def llama3_2_3b() -> dict[str, Any]:
    """Llama 3.2 3B."""
    return _llama(3072, 28, 24, 8192) | _LLAMA3_2


def _smollm2(
    hidden_size: int, num_layers: int, num_heads: int, kv_heads: int, intermediate_size: int, **values: Any
) -> dict[str, Any]:
    common = {
        "vocab_size": 49152,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
    }
    return _llama(hidden_size, num_layers, num_heads, intermediate_size) | common | values


@register_arch("smollm2-135m", model="llama")
def smollm2_135m() -> dict[str, Any]:
    """SmolLM2 135M (arXiv 2502.02737)."""
    return _smollm2(576, 30, 9, 3, 1536)


@register_arch("smollm2-360m", model="llama")
def smollm2_360m() -> dict[str, Any]:
    """SmolLM2 360M."""
    return _smollm2(960, 32, 15, 5, 2560)


@register_arch("smollm2-1.7b", model="llama")
def smollm2_1_7b() -> dict[str, Any]:
    """SmolLM2 1.7B."""
    return _smollm2(2048, 24, 32, 32, 8192, rope_theta=130000.0)
