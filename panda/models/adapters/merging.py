"""Merging adapters into the weights that they were trained on, one tensor at a time, to a plain model."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from panda.configuration.options import RunOptions
from panda.models.adapters.lora import PREFIX
from panda.models.adapters.lora import WHOLE
from panda.models.adapters.lora import add_adapters
from panda.models.adapters.quantisation import quantised_names
from panda.models.adapters.quantisation import rounded
from panda.registry import UserError
from panda.weights.stored_tensor import StoredTensor
from panda.weights.stored_tensor import Weights
from panda.weights.stored_tensor import places_of
from panda.weights.stored_tensor import put


def merged_weights(
    model: torch.nn.Module, base: Weights, adapters: Weights, options: RunOptions, device: torch.device
) -> tuple[Weights, str]:
    """The tensors of ``model`` with ``adapters`` added to ``base``, each made when it is read; and a sentence on it.

    ``model`` is the module without adapters, and ``base`` its weights by name. ``adapters`` have the names of the
    adapted model. peft adds them, in float32, and the sum is rounded to the type that training computed with. A
    quantised base is dequantised first, and not quantised again, which would lose most of what was learned. Raises
    UserError where an adapted weight is shared with another layer.
    """
    dtype = next(iter(adapters.values())).dtype
    of_layer: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in adapters.items():
        layer, found, rest = name.partition(".lora_")
        if (embedding := layer.partition(".token_adapter.")[0]) != layer:
            base = {**base, **_with_rows(base, f"{_in_base(embedding)}.weight", model, stored)}
        elif found:
            of_layer.setdefault(layer, {})[f"lora_{rest}"] = stored
        else:  # of a part that the task added, or a buffer, which training may change
            base = {**base, _in_base(layer): stored}
    adapted = _adapted_weights(model, options)
    if unlike := of_layer.keys() ^ {layer for layer, _ in adapted.values()}:
        raise UserError(
            f"--merge: only one of the run's configuration and its adapters has {min(unlike)}. Was it trained with"
            " another version of peft, which puts adapters on other layers by default? Use that one."
        )
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shared = [
        name.removesuffix(".weight")
        for name in adapted
        if name not in base or holders[id(model.get_parameter(name))] > 1
    ]
    if shared:
        raise UserError(
            f"--merge: {', '.join(shared)} shares its weight with another layer (tied embeddings), which has no"
            " adapter; merged, the two would differ. Export only the adapters, without --merge."
        )
    quantised = {f"{layer}.weight" for layer in quantised_names(model)} if options.use_quant else set()
    merged: dict[str, StoredTensor] = {}
    for name, stored in base.items():
        read = stored.read
        if name in quantised:
            read = partial(_quantised_once, model.get_submodule(name.removesuffix(".weight")), read, options, device)
        elif name in adapted:
            read = partial(_rounded, read, dtype)
        if name in adapted:
            layer, wrapper = adapted[name]
            read = partial(_merged, wrapper, read, of_layer[layer])
        merged[name] = StoredTensor(stored.shape, dtype if stored.dtype.is_floating_point else stored.dtype, read)
    done = f"adapters of rank {options.lora_r} merged into the base"
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


def _adapted_weights(model: torch.nn.Module, options: RunOptions) -> dict[str, tuple[str, Any]]:
    """For each weight of ``model`` that ``options`` put an adapter on, by its name: peft's layer for it, and its name.

    The layers are on the meta device.
    """
    from peft.tuners.lora import LoraLayer

    without_data = {id(p): torch.nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    found = {}
    for layer, wrapper in add_adapters(copy.deepcopy(model, without_data), options).named_modules():
        if isinstance(wrapper, LoraLayer):
            found[f"{_in_base(layer)}.{getattr(wrapper, 'parameter_name', 'weight')}"] = (layer, wrapper)
    return found


def _in_base(name: str) -> str:
    """``name``, of a module or tensor of the adapted model, as it is in the base."""
    name = name.removeprefix(PREFIX).replace(WHOLE, ".")
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _rounded(read: Callable[[], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The weight that ``read`` returns, in the type of training."""
    return read().to(dtype)


def _quantised_once(
    layer: Any, read: Callable[[], torch.Tensor], options: RunOptions, device: torch.device
) -> torch.Tensor:
    """The weight of ``layer``, as ``read`` returns it, with the rounding of training: quantised and dequantised."""
    layer = copy.deepcopy(layer).to("meta")
    layer.bias = None
    layer.weight = torch.nn.Parameter(read(), requires_grad=False)
    return rounded(layer, options, device)


def _merged(wrapper: Any, read: Callable[[], torch.Tensor], adapters: dict[str, StoredTensor]) -> torch.Tensor:
    """The weight that ``read`` returns with ``adapters`` added by ``wrapper``, peft's layer on the meta device."""
    wrapper = copy.deepcopy(wrapper)
    name = getattr(wrapper, "parameter_name", "weight")
    base = wrapper.get_base_layer()
    setattr(base, name, torch.nn.Parameter(_in_float32(read()), requires_grad=False))
    places = places_of(wrapper)
    for key, stored in adapters.items():
        put(places[key], _in_float32(stored.read()))
    with torch.no_grad():
        wrapper.merge(safe_merge=True)
    result: torch.Tensor = base.get_parameter(name).detach()
    return result


def _in_float32(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in host memory: a base of random weights is drawn on a GPU where there is one."""
    return tensor.to("cpu", torch.float32)
