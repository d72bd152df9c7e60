"""Merging adapters into the weights that they were trained on, one tensor at a time, to a plain model."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from panda.configuration.options import RunOptions
from panda.models.adapters.quantisation import quantised_names
from panda.models.adapters.quantisation import rounded
from panda.registry import UserError
from panda.weights.stored_tensor import StoredTensor
from panda.weights.stored_tensor import Weights

PREFIX = "base_model.model."
"""The prefix that peft adds to the names of a base's modules."""


def merged_weights(
    model: torch.nn.Module, base: Weights, adapters: Weights, config: Any, options: RunOptions, device: torch.device
) -> tuple[Weights, str]:
    """The tensors of ``model`` with ``adapters`` added to ``base``, each made when it is read; and a sentence on it.

    ``model`` is the module without adapters, and ``base`` its weights by name. ``adapters`` have the names of the
    adapted model, and peft's configuration ``config``. peft adds them, in float32, and the sum is rounded to the
    type that training computed with. A quantised base is dequantised first, and not quantised again, which would
    lose most of what was learned. Raises UserError where an adapted weight is shared with another layer.
    """
    if config.target_parameters or any(".experts." in name for name in adapters):
        raise UserError(
            "--merge: panda does not merge adapters on experts. Export only the adapters, without --merge; plain peft"
            " merges them (`merge_and_unload`)."
        )
    dtype = next(iter(adapters.values())).dtype
    of_layer: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in adapters.items():
        layer, found, rest = name.removeprefix(PREFIX).partition(".lora_")
        if (embedding := layer.partition(".token_adapter.")[0]) != layer:
            base = {**base, **_with_rows(base, f"{embedding}.weight", model, stored)}
        elif found:
            of_layer.setdefault(layer, {})[f"lora_{rest}"] = stored
        else:  # a buffer, which training may change
            base = {**base, layer.replace(".base_layer.", "."): stored}
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shared = [
        layer
        for layer in of_layer
        if f"{layer}.weight" not in base or holders[id(model.get_submodule(layer).weight)] > 1
    ]
    if shared:
        raise UserError(
            f"--merge: {', '.join(shared)} shares its weight with another layer (tied embeddings), which has no"
            " adapter; merged, the two would differ. Export only the adapters, without --merge."
        )
    quantised = set(quantised_names(model)) if options.use_quant else set()
    merged: dict[str, StoredTensor] = {}
    for name, stored in base.items():
        layer, _, last = name.rpartition(".")
        read = stored.read
        if last == "weight" and (layer in of_layer or layer in quantised):
            plain = copy.deepcopy(model.get_submodule(layer)).to("meta")
            parts = plain, stored.read, of_layer.get(layer, {}), config
            read = partial(_merged, *parts, partial(rounded, options=options, device=device), dtype)
            if layer not in quantised:
                read = partial(_merged, *parts, None, dtype)
        merged[name] = StoredTensor(stored.shape, dtype if stored.dtype.is_floating_point else stored.dtype, read)
    done = f"adapters of rank {config.r} merged into the base"
    if options.use_quant:
        done += (
            f", which was dequantised from {options.quant_bits} bits to {str(dtype).removeprefix('torch.')}, and"
            " differs from the original by their rounding"
        )
    return merged, f"{done}."


def _with_rows(base: Weights, name: str, model: Any, rows: StoredTensor) -> Weights:
    """The tensor ``name`` of ``base`` with ``rows`` in the place of the new rows of ``model``."""

    def read() -> torch.Tensor:
        whole = base[name].read().to(rows.dtype, copy=True)
        whole[model.new_rows.start : model.new_rows.stop] = rows.read()
        return whole

    return {name: StoredTensor(base[name].shape, rows.dtype, read)}


def _merged(
    layer: Any,
    read: Callable[[], torch.Tensor],
    adapters: dict[str, StoredTensor],
    config: Any,
    round_: Callable[[Any], torch.Tensor] | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight of ``layer``, a module on the meta device, as ``read`` returns it, with any ``adapters`` added.

    Before that it is rounded as it was in training: by ``round_``, which quantises, or else to ``dtype``.
    """
    from peft import inject_adapter_in_model

    layer = copy.deepcopy(layer)
    layer.bias = None
    layer.weight = torch.nn.Parameter(read(), requires_grad=False)
    weight = round_(layer) if round_ else layer.weight.detach().to(dtype)
    if not adapters:
        return weight
    layer.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    alone = copy.copy(config)
    alone.target_modules, alone.task_type = {"layer"}, None
    holder = torch.nn.ModuleDict({"layer": layer})
    inject_adapter_in_model(alone, holder)
    adapted: Any = holder["layer"]
    with torch.no_grad():
        for name, stored in adapters.items():
            adapted.get_parameter(name).copy_(stored.read())
    adapted.merge(safe_merge=True)
    result: torch.Tensor = adapted.get_base_layer().weight.detach()
    return result
