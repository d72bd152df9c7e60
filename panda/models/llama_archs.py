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
