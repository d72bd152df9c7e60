"""The kind of each parameter of a module: the one place that decides it."""

from __future__ import annotations

import math
from typing import Any

import torch

from panda.registry.contexts import ParameterDescription
from panda.registry.contexts import ParameterKind
from panda.weights.layer_names import layer_of
from panda.weights.stored_tensor import whole_shape

_NEW_ROWS = "trainable_tokens_delta"
"""What peft calls the rows that it trains of a frozen embedding or head."""


def describe_parameters(module: torch.nn.Module) -> dict[torch.Tensor, ParameterDescription]:
    """The trainable parameters of ``module``, each under its first name and in its whole shape."""
    tables: list[Any] = [part for part in module.modules() if _is_table(part)]
    embeddings = {id(part.weight): len(whole_shape(part.weight)) and whole_shape(part.weight)[0] for part in tables}
    rows_of_embeddings = _rows_of_embeddings(module)
    norms = {
        id(parameter)
        for part in module.modules()
        if "norm" in type(part).__name__.lower()
        for parameter in part.parameters(recurse=False)
    }
    head = _output_weight(module)
    rows = max(embeddings.values(), default=0)

    def kind_of(name: str, parameter: Any) -> ParameterKind:
        shape, words = whole_shape(parameter), name.split(".")
        if id(parameter) in embeddings or id(parameter) in rows_of_embeddings or "lora_embedding_A" in words:
            return "embedding"
        if _NEW_ROWS in words:  # the others that peft trains are of the head
            return "head"
        if id(parameter) in norms and len(shape) <= 1:
            return "norm"
        if words[-1].startswith("bias") or words[-1].endswith("bias"):
            return "bias"
        if math.prod(shape) == max(shape, default=1):  # also a matrix of one row, as of a reward
            return "vector"
        if any(word.startswith("lora_") for word in words):
            return "adapter"
        if parameter is head or (len(shape) == 2 and shape[0] == rows and layer_of(name) is None):
            return "head"
        if "experts" in words:
            return "expert"
        return "matrix" if len(shape) == 2 else "tensor"

    return {
        parameter: ParameterDescription(
            name, whole_shape(parameter), kind_of(name, parameter), getattr(parameter, "split_dimension", None)
        )
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def _is_table(part: Any) -> bool:
    # By attribute, not by class: tensor parallelism and quantisation have embedding classes of their own.
    return hasattr(part, "num_embeddings")


def _rows_of_embeddings(module: torch.nn.Module) -> set[int]:
    """The ids of the rows that peft trains of frozen embeddings; a head that is tied to one has the same rows."""
    return {
        id(rows)
        for part in module.modules()
        if _is_table(getattr(part, "base_layer", None))
        for rows in getattr(part, _NEW_ROWS, {}).values()
    }


def _output_weight(module: Any) -> Any:
    """The weight of the layer that a transformers model calls its output embeddings; None where it names none."""
    try:
        # Its own: of an embedding with rows that peft trains, `weight` is computed of weights that may be elsewhere.
        return module.get_output_embeddings()._parameters.get("weight")
    except (AttributeError, NotImplementedError):
        return None
