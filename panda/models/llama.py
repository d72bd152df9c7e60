"""The LLaMA model (arXiv 2302.13971), on transformers' modules. Its named sizes are in llama_archs.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any
from typing import Literal

from panda.configuration.positions import rope_of
from panda.files.terminal import number_of
from panda.registry import Meta
from panda.registry import UserError
from panda.registry import register_model
from panda.registry.contexts import ModelContext
from panda.registry.contexts import TensorParallelPlan
from panda.registry.errors import in_brief

if TYPE_CHECKING:
    import torch


ROPE_SCALINGS = ("linear", "dynamic", "llama3")


@dataclass(frozen=True)
class LlamaOptions:
    """Options of the LLaMA model. The defaults are those of LLaMA-7B; a checkpoint overrides them."""

    vocab_size: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    """Rows of the embedding; by default one for each entry of the tokenizer."""
    hidden_size: Annotated[int, Meta(ge=1, le=2**20)] = 4096
    """Width of the residual stream."""
    intermediate_size: Annotated[int, Meta(ge=1, le=2**24)] = 11008
    """Width inside the feed-forward blocks."""
    num_layers: Annotated[int, Meta(ge=1, le=10**4)] = 32
    """Transformer blocks."""
    num_heads: Annotated[int, Meta(ge=1, le=2**16)] = 32
    """Attention heads; must divide hidden_size."""
    num_key_value_heads: Annotated[int, Meta(ge=1, le=2**16)] | None = None
    """Heads of keys and values, each shared by num_heads / num_key_value_heads queries; by default num_heads."""
    tie_word_embeddings: bool = False
    """Use one matrix for both the embedding and the output."""
    attention_bias: bool = False
    """Add a bias to the four projections of attention."""
    max_position_embeddings: Annotated[int, Meta(ge=1, le=2**31)] = 2048
    """Number of positions that the model is declared to support, written to its config."""
    rope_theta: Annotated[float, Meta(gt=0)] = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: Literal["linear", "dynamic", "llama3"] | None = None
    """How the rotary embedding is stretched beyond the positions that the model was first trained on."""
    rope_scaling_factor: Annotated[float, Meta(ge=1)] | None = None
    """The factor by which rope_scaling stretches."""
    rope_original_max_position_embeddings: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    """Positions before stretching; only for `rope_scaling: llama3`. By default max_position_embeddings."""
    rope_low_freq_factor: Annotated[float, Meta(gt=0)] = 1.0
    """Original positions over this: longer wavelengths are stretched fully; only for `rope_scaling: llama3`."""
    rope_high_freq_factor: Annotated[float, Meta(gt=0)] = 4.0
    """Original positions over this: shorter wavelengths are not stretched; only for `rope_scaling: llama3`."""
    rms_norm_eps: Annotated[float, Meta(gt=0)] = 1e-6
    """Epsilon of the RMS normalisation."""
    initializer_range: Annotated[float, Meta(gt=0)] = 0.02
    """Standard deviation of the initial weights."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """How attention is computed. sdpa: torch's kernels, on a GPU FlashAttention where possible; auto chooses it.
    eager: matrix products and a softmax, slow and in much memory, for comparison."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise UserError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}.")
        if self.num_key_value_heads and self.num_heads % self.num_key_value_heads:
            raise UserError(
                f"num_heads {self.num_heads} is not divisible by num_key_value_heads {self.num_key_value_heads}."
            )
        if (self.rope_scaling is None) != (self.rope_scaling_factor is None):
            raise UserError(
                f"rope_scaling is {self.rope_scaling} and rope_scaling_factor {self.rope_scaling_factor}:"
                " they need each other."
            )
        if self.rope_original_max_position_embeddings and self.rope_scaling != "llama3":
            raise UserError("rope_original_max_position_embeddings is only used with `rope_scaling: llama3`.")

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The options that ``config``, a checkpoint's config.json, determines. Raises UserError for other models."""
        if config["model_type"] != "llama":
            raise UserError(
                f"model llama: the checkpoint's model_type is {config['model_type']!r}. `--model hf` accepts any causal"
                " language model that transformers knows."
            )
        rope = rope_of(config)
        scaling = rope.get("rope_type", rope.get("type", "default"))
        if scaling not in ("default", *ROPE_SCALINGS):
            raise UserError(
                f"model llama: the checkpoint scales RoPE by {scaling!r}; known are {', '.join(ROPE_SCALINGS)}."
                " `--model hf` does as transformers does."
            )
        if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
            raise UserError("model llama: the checkpoint rotates a part of each head only. `--model hf` does that.")
        needed = [] if scaling == "default" else ["factor"]
        needed += ["low_freq_factor", "high_freq_factor"] * (scaling == "llama3")
        if absent := [key for key in needed if key not in rope]:
            raise UserError(
                f"model llama: the checkpoint scales RoPE by {scaling!r}, but its config.json does not state"
                f" {', '.join(absent)}."
            )
        found = {
            "vocab_size": config.get("vocab_size", 32000),
            "hidden_size": config["hidden_size"],
            "intermediate_size": config["intermediate_size"],
            "num_layers": config["num_hidden_layers"],
            "num_heads": config["num_attention_heads"],
            "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
            "tie_word_embeddings": config.get("tie_word_embeddings", False),
            "attention_bias": config.get("attention_bias", False),
            "rope_theta": rope.get("rope_theta") or config.get("rope_theta", 10000.0),
            "rope_scaling": None if scaling == "default" else scaling,
            "rope_scaling_factor": None if scaling == "default" else rope["factor"],
            "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        }
        positions = config.get("max_position_embeddings")  # Meta's own format does not say
        if positions is not None:
            found["max_position_embeddings"] = positions
        if scaling == "llama3":
            found |= {
                "rope_original_max_position_embeddings": rope.get("original_max_position_embeddings", positions),
                "rope_low_freq_factor": rope["low_freq_factor"],
                "rope_high_freq_factor": rope["high_freq_factor"],
            }
        return found


@contextmanager
def _senseless(values: str) -> Iterator[None]:
    """Raise UserError for what transformers finds in ``values`` when it makes the layers."""
    try:
        yield
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as problem:
        raise UserError(
            f"model llama: transformers makes no LLaMA of {values}: {type(problem).__name__}: {in_brief(problem)}."
        ) from problem


@register_model("llama", options=LlamaOptions)
def build_llama(options: LlamaOptions, context: ModelContext) -> torch.nn.Module:
    """LLaMA causal language model (arXiv 2302.13971), with the additions of LLaMA 2 and 3."""
    vocab_size = options.vocab_size or context.vocab_size
    given: dict[str, Any] = {name: getattr(context, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    if context.config is not None:
        vocab_size = context.config.get("vocab_size", vocab_size)
        # The rest of its config is kept; rope_parameters below replaces these two.
        given = {key: value for key, value in context.config.items() if key not in ("rope_theta", "rope_scaling")}
    if vocab_size < context.vocab_size:
        raise UserError(
            f"vocab_size {vocab_size} is too small for the tokenizer, whose highest id is {context.vocab_size - 1}."
        )

    import torch
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM

    from panda.models.forward.cross_entropy import offer_loss_sum
    from panda.models.forward.packed_rows import tell_packing
    from panda.models.forward.stretched_positions import stretch_by_sample
    from panda.models.initialisation.creation import keep_computed_float32

    _refuse_padding_beyond(vocab_size, given.get("pad_token_id"))
    config = LlamaConfig(
        **given
        | {
            "vocab_size": vocab_size,
            "hidden_size": options.hidden_size,
            "intermediate_size": options.intermediate_size,
            "num_hidden_layers": options.num_layers,
            "num_attention_heads": options.num_heads,
            "num_key_value_heads": options.num_key_value_heads or options.num_heads,
            "max_position_embeddings": _positions(options, context),
            "rope_parameters": _rope_parameters(options),
            "rms_norm_eps": options.rms_norm_eps,
            "initializer_range": options.initializer_range,
            "tie_word_embeddings": options.tie_word_embeddings,
            "attention_bias": options.attention_bias,
            "use_cache": False,  # a cache of keys and values is of no use in training
        }
    )
    with _senseless("the config.json of the model" if context.config is not None else "these sizes"):
        model: Any = LlamaForCausalLM._from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32, attn_implementation=options.attention.replace("auto", "sdpa")
        )
    keep_computed_float32(model)
    tell_packing(model)
    stretch_by_sample(model, context.max_seq_length)
    offer_loss_sum(model)
    model.tensor_parallel_plan = _plan(options, vocab_size)
    return model  # type: ignore[no-any-return]


def _plan(options: LlamaOptions, vocab_size: int) -> TensorParallelPlan:
    return TensorParallelPlan(
        column=("*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj", "*.up_proj"),
        row=("*.o_proj", "*.down_proj"),
        vocabulary=("model.embed_tokens", "lm_head"),
        sizes={
            "num_heads": options.num_heads,
            "num_key_value_heads": options.num_key_value_heads or options.num_heads,
            "intermediate_size": options.intermediate_size,
            "vocab_size": vocab_size,
        },
        blocks=("*.self_attn", "*.mlp"),
    )


def _refuse_padding_beyond(rows: int, pad: Any) -> None:
    if isinstance(pad, int) and not -rows <= pad < rows:
        raise UserError(
            f"model llama: its pad_token_id is {pad}, and its embedding has {number_of(rows, 'row')}. Write"
            ' `"pad_token_id": null` in config.json: padding needs no row.'
        )


def _positions(options: LlamaOptions, context: ModelContext) -> int:
    """Positions to declare: of random weights enough for the run; of a checkpoint its own, which stretching refers to.

    A linear or dynamic stretch comes on top of them.
    """
    if "max_position_embeddings" in (context.config or {}):  # Meta's own format does not say
        return options.max_position_embeddings
    stretch = options.rope_scaling_factor if options.rope_scaling in ("linear", "dynamic") else None
    return max(options.max_position_embeddings, math.ceil(context.max_seq_length / (stretch or 1)))


def _rope_parameters(options: LlamaOptions) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": options.rope_scaling or "default", "rope_theta": options.rope_theta}
    if options.rope_scaling is not None:
        parameters["factor"] = options.rope_scaling_factor
    if options.rope_scaling == "llama3":
        original = options.rope_original_max_position_embeddings or options.max_position_embeddings
        parameters |= {
            "original_max_position_embeddings": original,
            "low_freq_factor": options.rope_low_freq_factor,
            "high_freq_factor": options.rope_high_freq_factor,
        }
    return parameters
