"""Quantised base weights under adapters (QLoRA, arXiv 2305.14314), through bitsandbytes.

4 bits are NormalFloat, with quantised scales; 8 bits are LLM.int8 (arXiv 2208.07339). Every linear layer
except the output head is quantised on the device where it will run, one after another, so that at most one
layer is on it in full precision.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from panda.configuration.options import RunOptions
from panda.models.adapters.experts import expert_parameters
from panda.models.adapters.linear_layers import linear_names
from panda.registry import UserError
from panda.weights.stored_tensor import whole_shape

# When imported without a GPU, bitsandbytes (0.50, 2026-11) looks for kernels on the hub, and logs that there are none.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

OUTLIER = 6.0
"""LLM.int8 multiplies activations above it in 16 bits, as its authors do."""


def quantise(
    model: Any, options: RunOptions, device: torch.device, fill: Callable[[str, torch.nn.Module], None] | None = None
) -> None:
    """Quantise the linear layers of ``model`` except its output head, in place, on ``device``, to ``quant_bits``.

    They compute in the dtype of ``options.precision``. For a model on the meta device, ``fill(name, layer)`` is
    called before each is quantised, to give ``layer`` its weights.
    Raises UserError as ``refuse_quantising`` does.
    """
    refuse_quantising(model)
    for name in quantised_names(model):
        layer: Any = model.get_submodule(name)
        if fill is not None:
            fill(name, layer)
        model.set_submodule(name, _quantised(layer, options, device))
    # By these attributes peft (0.21, 2026-11) chooses the classes of its own layers.
    marked: Any = model
    marked.is_loaded_in_4bit, marked.is_loaded_in_8bit = options.quant_bits == 4, options.quant_bits == 8


def refuse_quantising(model: torch.nn.Module) -> None:
    """Raise UserError where it is not known which layer of ``model`` is the output head, and for experts.

    ``model`` may be without weights.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"use_quant: it is not known which linear layer of {type(model).__name__} is the output head, which must"
            " not be quantised. Use a model of transformers, or leave `use_quant` out."
        )
    if experts := expert_parameters(model):
        share = sum(experts.values()) / sum(math.prod(whole_shape(parameter)) for parameter in model.parameters())
        raise UserError(
            f"use_quant: {share:.0%} of the weights of {type(model).__name__} are those of experts, which bitsandbytes"
            " does not quantise: they are no linear layers. Leave `use_quant` out; `zero_stage: 3` partitions them."
        )


def quantised_names(model: Any) -> list[str]:
    """Names of the layers that ``quantise`` quantises in ``model``, a model of transformers."""
    head = model.get_output_embeddings()
    return [name for name in linear_names(model) if model.get_submodule(name) is not head]


def rounded(layer: torch.nn.Linear, options: RunOptions, device: torch.device) -> torch.Tensor:
    """The weight of ``layer`` after quantising and dequantising it, on the CPU in float32."""
    bnb = _bitsandbytes()
    quantised: Any = _quantised(layer, options, device)
    weight = quantised.weight
    if options.quant_bits == 8:
        whole = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    else:
        whole = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    result: torch.Tensor = whole.float().cpu()
    return result


def _quantised(layer: torch.nn.Linear, options: RunOptions, device: torch.device) -> torch.nn.Linear:
    bnb = _bitsandbytes()
    shape = (layer.in_features, layer.out_features, layer.bias is not None)
    if options.quant_bits == 8:
        quantised = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=OUTLIER, device="meta")
        weight = bnb.nn.Int8Params(layer.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        dtype: torch.dtype = getattr(torch, options.dtype_name)
        kind = {
            "compress_statistics": True,
            "quant_type": "nf4",
            # ZeRO-3 partitions it, and needs the dtype of the other weights for that.
            "quant_storage": dtype if options.zero == 3 else torch.uint8,
        }
        quantised = bnb.nn.Linear4bit(*shape, compute_dtype=dtype, device="meta", **kind)
        # On a CPU with AVX512-BF16, evaluation in bitsandbytes 0.50 (2026-11) repacks the weights in place for a
        # product without gradient: adapters in layers before it would stop learning, and ZeRO-3 would lose the
        # repacked weights. Can go when it repacks a copy.
        quantised.support_avx512bf16_for_cpu = False
        weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, module=quantised, **kind)
    quantised.weight = weight.to(device)
    if layer.bias is not None:
        quantised.bias = torch.nn.Parameter(layer.bias.data.to(device), requires_grad=False)
    return quantised.train(layer.training)  # type: ignore[no-any-return]


def _bitsandbytes() -> Any:
    """bitsandbytes, an optional dependency without type hints."""
    return import_module("bitsandbytes")
