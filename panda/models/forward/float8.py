"""The products of large linear layers in float8, by torchao: `precision: fp8`.

A linear layer has three products: of its input and its weight, and in the backward pass of its gradient with each of
the two. All three multiply float8 numbers, e4m3 for inputs and weights and e5m2 for gradients (arXiv 2209.05433), of
which each tensor is scaled by one number, taken from its own largest value. Sums are float32, and results bf16; weights
stay bf16, with masters in fp32, and so do attention, normalisation, the embedding and the head.
"""

from __future__ import annotations

import torch

from panda.models.forward.layers import numbered_layers
from panda.registry import UserError

SMALLEST = 2048
"""Inputs, and outputs, that a layer has at least: of smaller ones, converting takes what the product saves."""
MULTIPLE = 16
"""Of which both are multiples: so the products want it."""
CAPABILITY = (8, 9)
"""The compute capability from which on a GPU multiplies float8 numbers: Ada, Hopper, and later."""


def refuse_without_float8(device: torch.device) -> None:
    """Raise UserError if ``device`` is a GPU that cannot multiply float8 numbers. A CPU can, though slowly."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UserError(
            f"precision: fp8 needs a GPU of compute capability {'.'.join(map(str, CAPABILITY))} or later, Ada or"
            f" Hopper, and {torch.cuda.get_device_name(device)} has"
            f" {'.'.join(map(str, torch.cuda.get_device_capability(device)))}. Write `precision: bf16`."
        )


def converted_layers(model: torch.nn.Module) -> list[str]:
    """The names of the linear layers of ``model`` whose products ``compute_in_float8`` makes float8.

    Those inside of numbered layers, so not the head, which are large enough. Raises UserError without numbered layers.
    """
    inside = {id(linear) for layer in numbered_layers(model, "precision: fp8") for linear in layer.modules()}
    return [
        name
        for name, module in model.named_modules()
        if id(module) in inside and type(module) is torch.nn.Linear and _is_large(module)
    ]


def _is_large(linear: torch.nn.Linear) -> bool:
    sizes = linear.in_features, linear.out_features
    return min(sizes) >= SMALLEST and not any(size % MULTIPLE for size in sizes)


def compute_in_float8(model: torch.nn.Module) -> None:
    """Replace the linear layers that ``converted_layers`` names by torchao's, which have the same parameters.

    They are faster than bf16 in compiled code only, where converting is part of other kernels.
    """
    from torchao.float8 import Float8LinearConfig
    from torchao.float8 import convert_to_float8_training

    chosen = set(converted_layers(model))
    # Tokens are what the product for a weight's gradient sums over, and are padded to a multiple of 16.
    config = Float8LinearConfig(pad_inner_dim=True)
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in chosen, config=config)
