"""Which weights ZeRO-3 gathers together, and how far ahead: those of a layer, while the layer before computes.

DeepSpeed (0.19.8) gathers weights when the module that has them is run: nine times in a layer of LLaMA, and more often
with adapters. Here a layer gathers those of all its parts, and its parts have no hooks. That is one collective a layer
in each pass, and little Python around it. What runs between the hooks is the layer's forward, which can be compiled;
activations that are computed again in the backward pass find the weights of the whole layer.

Gathered weights stay no longer than DeepSpeed means: for backward its linear layers, panda's adapted layers, and the
code that torch compiles of them save the parameter itself, whose data DeepSpeed takes away and brings back.

Where a GPU has room for them, some layers stay gathered from forward to backward and from one micro batch to the next
(layer_weights.py).

Adapters are not partitioned: they are a hundredth of the weights, and to gather 14 of them in each layer takes longer
on the host than the layer's own seven.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from panda.engine.deepspeed_config import LARGEST_LAYER
from panda.engine.deepspeed_config import layers_staying
from panda.engine.deepspeed_config import zero_3_sizes
from panda.engine.layer_gradients import LayerGradients
from panda.engine.layer_weights import LayerWeights
from panda.registry import UserError
from panda.weights.layer_names import layer_of
from panda.weights.stored_tensor import whole_shape

DEFAULT_THRESHOLD = 100_000
"""DeepSpeed's own: elements of the largest weight that every rank keeps."""
KEPT_WHOLE = 0.05
"""Share of the weights that every rank keeps, if those that are trained are no larger than that."""


def with_sizes(config: dict[str, Any], module: torch.nn.Module) -> dict[str, Any]:
    """``config``, DeepSpeed's, and under ZeRO-3 the sizes that follow from ``module`` where it does not say them."""
    zero = config.get("zero_optimization", {})
    if zero.get("stage") != 3:
        return config
    counts = {parameter: math.prod(whole_shape(parameter)) for parameter in module.parameters()}
    layer, outside = layer_and_outside(module)
    sizes = zero_3_sizes(
        elements=sum(counts.values()),
        trained=sum(count for parameter, count in counts.items() if parameter.requires_grad),
        layer=layer,
        outside=outside,
    )
    largest = max((count for parameter, count in counts.items() if parameter.requires_grad), default=0)
    kept = sum(count for count in counts.values() if count <= largest)
    if sizes and kept <= KEPT_WHOLE * sum(counts.values()):
        sizes["stage3_param_persistence_threshold"] = max(largest, DEFAULT_THRESHOLD)
    return config | {"zero_optimization": sizes | zero}


def layer_and_outside(module: torch.nn.Module) -> tuple[int, int]:
    """Elements of the largest layer of ``module``, and of all weights outside of layers."""
    counts = {parameter: math.prod(whole_shape(parameter)) for parameter in module.parameters()}
    layers = [{*layer.parameters()} for name, layer in module.named_modules() if layer_of(name) == name]
    largest = max((sum(counts[parameter] for parameter in layer) for layer in layers), default=0)
    return largest, sum(counts[parameter] for parameter in counts.keys() - set[torch.nn.Parameter]().union(*layers))


def gather_by_layers(module: torch.nn.Module, optimizer: Any, device: torch.device, live: int) -> None:
    """Under ZeRO-3, let each layer of ``module`` gather all its weights when it is run.

    ``live``: DeepSpeed's `stage3_max_live_parameters`, or 0. What exceeds the least that is needed at a time
    is for layers that stay gathered through a step.

    A layer stays as it is, and gathers by its modules, if it has more than ``LARGEST_LAYER`` weights, or a part or a
    weight that is used from outside too, or if weights are on NVMe, for which DeepSpeed has buffers for a few weights.
    In such a layer and outside of layers, a module with ``reads_parts``, such as an adapted layer, gathers the weights
    of its parts, which it reads without running them; and a model with ``sums_loss`` gathers those of its head.
    DeepSpeed finds out by itself what a module reads of others, but not where the weight is there at that time because
    it was fetched ahead: backward then fails. Its leaf modules would gather whole layers as well, but fail where the
    input has no gradient, as in a first layer.

    Raises UserError for a layer with ``is_compiled`` that has to stay as it is: compiled code has no hooks.
    """
    offload = getattr(optimizer, "parameter_offload", None)
    if offload is None:
        return
    from deepspeed.runtime.zero import register_external_parameter

    _trace_linear_layers_of_torch()
    models: list[Any] = [part for part in module.modules() if getattr(part, "sums_loss", False)]
    for model in models:
        for parameter in model.get_output_embeddings().parameters():
            register_external_parameter(model, parameter)
    layers = {name: layer for name, layer in module.named_modules() if layer_of(name) == name}
    run_outside = _parts_outside(module, {*layers.values()})
    whole: list[torch.nn.Module] = []
    for name, layer in layers.items():
        against = _what_forbids(layer, run_outside, offload)
        if against and getattr(layer, "is_compiled", False):
            raise UserError(
                f"compile: with zero_stage: 3, layers are compiled if they are gathered whole, and {name} {against}."
                " Write `compile: false`."
            )
        if not against:
            whole.append(layer)
    gathered = {part for layer in whole for part in layer.modules()}
    hooks = {id(hooks) for part in gathered for hooks in (part._forward_hooks, part._forward_pre_hooks)}
    for reader in module.modules():
        if reader not in gathered and getattr(reader, "reads_parts", False):
            for part in reader.modules():
                if part is not reader:
                    hooks |= {id(part._forward_hooks), id(part._forward_pre_hooks)}
                    for parameter in part.parameters(recurse=False):
                        register_external_parameter(reader, parameter)
    for handle in (*offload.forward_hooks, *offload.backward_hooks):
        if id(handle.hooks_dict_ref()) in hooks:
            handle.remove()
    if whole:
        begin = LayerGradients(whole, optimizer, device).begin
        LayerWeights(module, whole, optimizer, device, begin, layers_staying(live, *layer_and_outside(module)))


def _trace_linear_layers_of_torch() -> None:
    """Let torch compile its own linear layer in place of the one that DeepSpeed (0.19.8) replaces it by.

    In backward, DeepSpeed's asks whether the weight has a ``ds_id``, and torch 2.11 compiles code for that number only:
    each layer again, and after eight none. Compiled code saves the parameter itself with either.
    """
    import deepspeed.runtime.zero.linear as of_deepspeed

    replaced, eager = of_deepspeed.zero3_linear_wrap, torch.nn.functional.linear
    if eager is not replaced:
        return

    def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return torch._C._nn.linear(input, weight, bias)
        result: torch.Tensor = replaced(input, weight, bias)
        return result

    torch.nn.functional.linear = linear


def _what_forbids(layer: torch.nn.Module, run_outside: set[torch.nn.Module], offload: Any) -> str:
    """Why ``layer`` cannot gather all its weights at once, as the end of a sentence; empty if it can."""
    if offload.offload_device == "nvme":
        return "has weights on NVMe"
    parameters: list[Any] = list(layer.parameters())
    if any(each.ds_secondary_tensor is not None or hasattr(each.ds_tensor, "ds_quant_scale") for each in parameters):
        return "is gathered by ZeRO++"
    elements = sum(math.prod(whole_shape(parameter)) for parameter in parameters)
    if elements > LARGEST_LAYER:
        return f"has {elements:,} weights, more than {LARGEST_LAYER:,}"
    if not run_outside.isdisjoint(layer.modules()):
        return "shares modules with the rest of the model"
    outside = {id(each) for part in run_outside for each in part.parameters(recurse=False)}
    if any(id(each) in outside for each in parameters):
        return "shares weights with the rest of the model"
    return ""


def _parts_outside(module: torch.nn.Module, layers: set[torch.nn.Module]) -> set[torch.nn.Module]:
    """The modules to which a path leads from ``module`` that does not go through one of ``layers``."""
    found: set[torch.nn.Module] = set()
    left = [module]
    while left:
        part = left.pop()
        if part not in layers and part not in found:
            found.add(part)
            left += part.children()
    return found
