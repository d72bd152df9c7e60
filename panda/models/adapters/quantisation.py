"""Quantised base weights under adapters (QLoRA, arXiv 2305.14314), through bitsandbytes.

4 bits are NormalFloat, with their scales quantised too; 8 bits are LLM.int8 (arXiv 2208.07339). Each
linear layer but the output head is quantised on the device where it will run, one after another, so
that never more than one is there in full precision.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from panda.configuration.options import RunOptions
from panda.models.adapters.linear_layers import linear_names
from panda.registry import UserError

# It looks for kernels on the hub when it is imported on a CPU, and says that it has not found them.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUTLIER = 6.0
"""Activations above it are multiplied in 16 bits by LLM.int8, as its authors have it."""


def quantise(
    model: Any, options: RunOptions, device: torch.device, fill: Callable[[str, torch.nn.Module], None] | None = None
) -> None:
    """Quantise the linear layers of ``model`` but its output head to ``options.quant_bits``, in place, on ``device``.

    They compute in the dtype of ``options.precision``. A model on the meta device is filled on the
    way: ``fill(name, layer)`` is called with each, to put weights in the place of ``layer``'s.
    Raises UserError where the output head is not known.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"use_quant: which linear layer of {type(model).__name__} is the output head, and must stay as it is, is"
            " not known. Use a model of transformers, or leave `use_quant` out."
        )
    for name in quantised_names(model):
        layer: Any = model.get_submodule(name)
        if fill is not None:
            fill(name, layer)
        _replace(model, name, _quantised(layer, options, device))
    told: Any = model  # what peft asks to choose its layers by
    told.is_loaded_in_4bit, told.is_loaded_in_8bit = options.quant_bits == 4, options.quant_bits == 8


def quantised_names(model: Any) -> list[str]:
    """Names of the layers of ``model``, of transformers, that ``quantise`` quantises."""
    head = model.get_output_embeddings()
    return [name for name in linear_names(model) if model.get_submodule(name) is not head]


def rounded(layer: torch.nn.Linear, options: RunOptions, device: torch.device) -> torch.Tensor:
    """The weight of ``layer``, on the CPU in float32, as it is once quantised and dequantised."""
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
        dtype = DTYPES[options.precision]
        kind = {
            "compress_statistics": True,
            "quant_type": "nf4",
            # What ZeRO-3 spreads has to be of the dtype of the weights around it.
            "quant_storage": dtype if options.zero_stage == 3 else torch.uint8,
        }
        quantised = bnb.nn.Linear4bit(*shape, compute_dtype=dtype, device="meta", **kind)
        # On a CPU with AVX512-BF16, evaluation would repack the weights in place for a product that
        # has no gradient: adapters below would stop learning, and ZeRO-3 would lose the repacked ones.
        quantised.support_avx512bf16_for_cpu = False
        weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, module=quantised, **kind)
    quantised.weight = weight.to(device)
    if layer.bias is not None:
        quantised.bias = torch.nn.Parameter(layer.bias.data.to(device), requires_grad=False)
    return quantised.train(layer.training)  # type: ignore[no-any-return]


def _bitsandbytes() -> Any:
    """bitsandbytes, which is an extra, and has no types to speak of."""
    return import_module("bitsandbytes")


def _replace(model: torch.nn.Module, name: str, other: torch.nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, other)
