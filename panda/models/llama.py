"""The LLaMA family (arXiv 2302.13971), on transformers' modules, and its architectures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any
from typing import Literal

from panda.registry import Meta
from panda.registry import UserError
from panda.registry import register_arch
from panda.registry import register_model
from panda.registry.contexts import ModelContext

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LlamaOptions:
    """Options of the LLaMA model. The defaults are those of LLaMA-7B."""

    vocab_size: Annotated[int, Meta(ge=1)] | None = None
    """Rows of the embedding; by default as many as the tokenizer has entries."""
    hidden_size: Annotated[int, Meta(ge=1)] = 4096
    """Width of the residual stream."""
    intermediate_size: Annotated[int, Meta(ge=1)] = 11008
    """Width inside the feed-forward blocks."""
    num_layers: Annotated[int, Meta(ge=1)] = 32
    """Transformer blocks."""
    num_heads: Annotated[int, Meta(ge=1)] = 32
    """Attention heads; divides hidden_size."""
    max_position_embeddings: Annotated[int, Meta(ge=1)] = 2048
    """Positions that the model is declared to be good for, written to its config."""
    rope_theta: Annotated[float, Meta(gt=0)] = 10000.0
    """Base of the rotary position embedding."""
    rms_norm_eps: Annotated[float, Meta(gt=0)] = 1e-6
    """Epsilon of the RMS normalisation."""
    initializer_range: Annotated[float, Meta(gt=0)] = 0.02
    """Standard deviation of the initial weights."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """How attention is computed. sdpa: torch's kernels, on a GPU FlashAttention where it applies; auto chooses it.
    eager: matrix products and a softmax, slow and large, to compare with."""


@register_model("llama", options=LlamaOptions)
def build_llama(options: LlamaOptions, context: ModelContext) -> torch.nn.Module:
    """LLaMA causal language model (arXiv 2302.13971)."""
    if options.hidden_size % options.num_heads:
        raise UserError(f"hidden_size {options.hidden_size} is not divisible by num_heads {options.num_heads}.")
    vocab_size = options.vocab_size or context.vocab_size
    if vocab_size < context.vocab_size:
        raise UserError(f"vocab_size {vocab_size} is less than the tokenizer's {context.vocab_size} entries.")

    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM

    from panda.models.cross_entropy import offer_loss_sum

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        num_key_value_heads=options.num_heads,
        max_position_embeddings=max(options.max_position_embeddings, context.max_seq_length),
        rope_parameters={"rope_type": "default", "rope_theta": options.rope_theta},
        rms_norm_eps=options.rms_norm_eps,
        initializer_range=options.initializer_range,
        tie_word_embeddings=False,
        pad_token_id=context.pad_token_id,
        bos_token_id=context.bos_token_id,
        eos_token_id=context.eos_token_id,
        use_cache=False,  # a cache of keys and values is of no use in training
    )
    attention = "sdpa" if options.attention == "auto" else options.attention
    model: torch.nn.Module = LlamaForCausalLM._from_config(config, attn_implementation=attention)  # type: ignore[no-untyped-call]
    _keep_float32(model.get_submodule("model.rotary_emb"))
    offer_loss_sum(model)
    return model


def _keep_float32(module: torch.nn.Module) -> None:
    """Have ``module`` keep its buffers in float32 when the model around it is cast to 16 bits.

    DeepSpeed casts whole models, and with them the frequencies of the rotary embedding: positions
    past a few hundred then share angles, and the trained model is another one than the exported,
    which transformers loads with its frequencies in float32.
    """
    apply: Any = module._apply

    def move_only(convert: Any, recurse: bool = True) -> torch.nn.Module:
        moved: torch.nn.Module = apply(lambda tensor: tensor.to(convert(tensor).device), recurse)
        return moved

    module._apply = move_only  # type: ignore[method-assign]


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
