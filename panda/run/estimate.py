"""The memory that a run needs on each GPU, estimated from its configuration and the outline of its model.

Nothing is run and no weights are read, so this works on a machine without a GPU. A step is at its largest in one of
three moments: while the loss is computed, while the backward pass of a layer runs, or in the optimizer's step. The
longest rows are assumed: ``max_seq_length`` tokens in each of a micro batch.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from panda.configuration.options import RunOptions
from panda.engine.deepspeed_config import LARGEST_LAYER
from panda.engine.deepspeed_config import NEAR
from panda.engine.deepspeed_config import deepspeed_config
from panda.engine.deepspeed_config import live_parameters
from panda.engine.memory_parts import GIB
from panda.engine.memory_parts import MemoryParts
from panda.engine.memory_parts import Sizes
from panda.engine.memory_parts import held
from panda.engine.memory_parts import is_offloaded
from panda.engine.processes import own_device
from panda.engine.tensor_parallel import plan_of
from panda.models.adapters.experts import expert_parameters
from panda.models.adapters.lora import add_adapters
from panda.models.adapters.quantisation import quantised_names
from panda.models.adapters.quantisation import refuse_quantising
from panda.models.forward.footprint import Footprint
from panda.models.forward.footprint import footprint
from panda.models.forward.stretched_positions import needs_positions
from panda.models.forward.varlen_attention import what_forbids_kernel
from panda.models.forward.varlen_attention import why_masked
from panda.optim.parameter_kinds import describe_parameters
from panda.registry.contexts import ModelContext
from panda.registry.contexts import OptimizerContext
from panda.registry.contexts import ParameterDescription
from panda.registry.contexts import ParameterKind
from panda.registry.contexts import TensorParallelPlan
from panda.registry.resolve import Resolved
from panda.run.cards import Card
from panda.run.model import build_outline
from panda.run.reference import is_second_model
from panda.run.reference import reference_elements
from panda.run.reference import reference_of
from panda.weights.layer_names import layer_of

CONTEXT = round(0.6 * GIB)
"""What CUDA's context and the libraries take (H200, torch 2.11, 2026-11-26)."""
COMMUNICATION = round(0.5 * GIB)
"""The same for NCCL, of a run with several ranks."""
UNUSABLE = 0.06
"""Share of the memory that comes and goes in a step which the allocator holds and cannot use."""
MARGIN = 0.07
"""Share of a card's memory that an estimate leaves free where it is said to fit. A full 7B, compiled, that would leave
5 % of an H200 then recomputes its elementwise results: 0.4 % of a step for 4.7 GiB (2026-11-26)."""


@dataclass(frozen=True)
class ModelMemory:
    """What the outline of a model says about its memory and its work, on one tensor-parallel rank."""

    sizes: Sizes
    footprint: Footprint
    state_bytes: float
    """The optimizer's states, for each element that is trained."""
    parameters: int
    """Elements of the whole model, without adapters."""
    flops_per_token: float
    """Of forward and backward pass on all tensor-parallel ranks: 6 for each weight that is trained and 4 for a frozen
    one, of experts for those that a token uses. Attention comes on top."""
    rows: int
    """Rows that the model is given at once for a sample of a micro batch."""
    reference: int
    """Bytes of the frozen model that the task asks for, before ZeRO-3 partitions it."""
    copies: int
    """Of the trained weights, those that plugins hold."""
    attention_flops: float
    """The same for each token that a token attends to, by the usual count of 12 (not halved for being causal)."""

    @property
    def layers(self) -> int:
        """How many it has."""
        return sum(count for _, count in self.footprint.layers)

    def flops(self, length: float) -> float:
        """Operations for a token of a sample with ``length`` tokens; recomputation does not count."""
        return self.flops_per_token + self.attention_flops * length


@dataclass(frozen=True)
class Estimate:
    """The memory of each GPU of a run."""

    parts: MemoryParts
    moment: str
    """When a step is at its largest: ``loss``, ``backward`` or ``step``."""
    approximate: str = ""
    """Why it is less exact than it could be; empty where it is not."""

    def fits(self, card: Card) -> bool:
        """Whether ``card`` has that memory, and a margin."""
        return self.parts.total <= card.memory * (1 - MARGIN)


def model_memory(resolved: Resolved, context: ModelContext) -> ModelMemory | None:
    """What the model of ``resolved`` needs; None if it can only be built with weights.

    Raises UserError if it cannot be split over its tensor-parallel ranks, cannot be quantised, or has no layers for its
    adapters.
    """
    options: RunOptions = resolved.core
    model: Any = build_outline(resolved, context)
    if model is None:
        return None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if options.tensor_parallel_size > 1:
        name = resolved.components["model"].component.name
        _shard(model, plan_of(model, name, options.tensor_parallel_size), options.tensor_parallel_size)
    dtype = getattr(torch, options.dtype_name)
    masked = (options.batching == "packed" or needs_positions(model)) and bool(_why_masked(model, dtype))
    if options.use_quant:
        refuse_quantising(model)
    names = quantised_names(model) if options.use_quant else []
    quantised = {id(model.get_submodule(name).weight) for name in names}
    if options.use_lora:
        from panda.models.adapters.one_rounding import round_once  # imports peft

        with torch.device("meta"):
            model = add_adapters(model, options)
        round_once(model)
    element = 4 if options.precision == "fp32" else 2
    states = state_bytes(resolved, model)
    whole = sum(parameter.numel() for parameter in model.parameters()) * element  # of this rank, before any adapters
    sizes = _sizes(model, options, quantised)
    linear = _flops(model) * options.tensor_parallel_size
    model = model.to(torch.device("meta"), dtype)
    rows, length = _largest_sample(resolved)
    found = footprint(model, length=length, masked=masked)
    attention = 12.0 * found.attention_width * options.tensor_parallel_size
    copies = copies_of(resolved)
    return ModelMemory(sizes, found, states, parameters, linear, rows, _reference(resolved, whole), copies, attention)


def _largest_sample(resolved: Resolved) -> tuple[int, int]:
    """The rows that the largest sample has, and the tokens of each."""
    task = resolved.components["task"]
    length = resolved.core.max_seq_length
    asked: Any = getattr(task.component.factory, "largest_sample", None)
    if asked is None:
        return 1, length
    with task.attributed("`largest_sample`"):
        rows, tokens = asked(task.options, length)
    return rows, tokens


def _reference(resolved: Resolved, own: int) -> int:
    """Bytes on a rank of the frozen model that the task asks for; ``own``: of the model that is trained."""
    reference, options = reference_of(resolved), resolved.core
    if reference is None or not is_second_model(reference, options):
        return 0
    if reference.checkpoint is None:
        return own
    element = 4 if options.precision == "fp32" else 2
    size: int = element * reference_elements(reference, resolved) // options.tensor_parallel_size
    return size


def estimate(model: ModelMemory, options: RunOptions, world_size: int, staying: int = 0) -> Estimate:
    """The memory of each of ``world_size`` GPUs that train ``model`` with ``options``.

    ``staying``: layers that ZeRO-3 keeps gathered through a step.
    """
    config = deepspeed_config(options, world_size=world_size, on_gpu=True)
    if staying:
        live = live_parameters(model.sizes.layer, model.sizes.outside, staying)
        config["zero_optimization"]["stage3_max_live_parameters"] = live
    standing = held(
        model.sizes, options, config, world_size=world_size, state_bytes=model.state_bytes, copies=model.copies
    )
    rows, found = options.per_gpu_train_batch_size * model.rows, model.footprint
    copies = max(1, world_size // options.tensor_parallel_size)
    parts = replace(standing.parts, reference=model.reference // copies if options.zero == 3 else model.reference)
    how, compiled = options.activation_checkpointing, options.compiled
    kept, working = found.kept(how, compiled=compiled), found.working(how, compiled=compiled)
    element = 4 if options.precision == "fp32" else 2
    # Those of one weight exist in a backward pass only.
    lasting = parts.gradients if parts.gradients > element * model.sizes.largest else 0
    moments = {
        "loss": replace(parts, activations=rows * kept, logits=found.loss(rows), gradients=lasting),
        "backward": replace(parts, activations=rows * (kept + working)),
        "step": replace(parts, gradients=lasting + standing.step),
    }
    moment = max(moments, key=lambda name: moments[name].total)
    peak = moments[moment]
    passing = peak.activations + peak.logits + peak.gradients
    context = CONTEXT + COMMUNICATION * (world_size > 1) + round(UNUSABLE * passing)
    return Estimate(replace(peak, context=context), moment, found.approximate)


def layers_that_stay(model: ModelMemory, options: RunOptions, world_size: int, card: Card) -> int:
    """How many layers ZeRO-3 keeps gathered through a step: those for which ``card`` has room beside all else.

    No layer stays where DeepSpeed's file says how much does, where weights are on the host, and where one is too large.
    """
    zero: dict[str, Any] = deepspeed_config(options, world_size=world_size, on_gpu=True)["zero_optimization"]
    sizes, alone = model.sizes, world_size == options.tensor_parallel_size
    is_decided = "stage3_max_live_parameters" in zero or is_offloaded(zero, "offload_param")
    if options.zero != 3 or alone or is_decided or not 0 < sizes.layer <= LARGEST_LAYER:
        return 0
    room = card.memory * (1 - MARGIN) - estimate(model, options, world_size).parts.total
    if room <= 0:
        return 0
    element = 4 if options.precision == "fp32" else 2
    fitting = int(room / (element * sizes.layer))
    return fitting if fitting < model.layers - NEAR else model.layers  # the last ones take nothing: none is on its way


# -- the outline --------------------------------------------------------------------------------


def _shard(model: torch.nn.Module, plan: TensorParallelPlan, size: int) -> None:
    """Make the layers of ``model`` in ``plan`` as small as those that each of ``size`` ranks holds."""
    shards: dict[int, torch.nn.Parameter] = {}

    def share(parameter: torch.nn.Parameter | None, dimension: int) -> Any:
        if parameter is None:
            return None
        if id(parameter) not in shards:
            shards[id(parameter)] = torch.nn.Parameter(parameter.detach().chunk(size, dimension)[0].clone())
        return shards[id(parameter)]

    for name, layer in model.named_modules():
        if any(fnmatchcase(name, pattern) for pattern in (*plan.column, *plan.vocabulary)):
            layer.weight = share(layer.weight, 0)
            if getattr(layer, "bias", None) is not None:
                layer.bias = share(layer.bias, 0)
        elif any(fnmatchcase(name, pattern) for pattern in plan.row):
            layer.weight = share(layer.weight, 1)


def _why_masked(model: torch.nn.Module, dtype: torch.dtype) -> str:
    """Why attention needs a mask to tell samples apart on this machine's GPU; without one, on a recent one."""
    if torch.cuda.is_available():
        return why_masked(model, own_device(), dtype)
    return "there is no kernel for float32" if dtype == torch.float32 else what_forbids_kernel(model, dtype)


def _sizes(model: torch.nn.Module, options: RunOptions, quantised: set[int]) -> Sizes:
    element = 4 if options.precision == "fp32" else 2
    trained = frozen = largest = dequantised = 0
    groups: Counter[str | None] = Counter()
    stored: Counter[str | None] = Counter()
    dequantised_layers: Counter[str | None] = Counter()
    for name, parameter in model.named_parameters():
        count = held = parameter.numel()
        if parameter.requires_grad:
            trained += count
            largest = max(largest, count)
            groups[layer_of(name)] += count
        elif id(parameter) in quantised:
            size = _quantised_bytes(parameter, options.quant_bits)
            frozen += size
            held = size // element
            dequantised = max(dequantised, element * count)
            dequantised_layers[layer_of(name)] += element * count
        else:
            frozen += element * count
        stored[layer_of(name)] += held
    outside = stored.pop(None, 0)
    group, layer, whole = (max(counts.values(), default=0) for counts in (groups, stored, dequantised_layers))
    return Sizes(trained, frozen, stored.total() + outside, largest, group, dequantised, whole, layer, outside)


def _quantised_bytes(weight: torch.Tensor, bits: int) -> int:
    """As bitsandbytes stores it: NF4 with a scale in 8 bits for 64 weights, or LLM.int8 with one in fp32 for a row."""
    count = weight.numel()
    if bits == 8:
        return count + 4 * len(weight)
    scales = -(-count // 64)
    return -(-count // 2) + scales + 4 * -(-scales // 256)


def _flops(model: torch.nn.Module) -> float:
    """Operations for a token: of weights, without attention. A row of the embedding is looked up, at no cost."""
    experts, config = expert_parameters(model), getattr(model, "config", None)
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None)
    embeddings = [part.weight for part in model.modules() if isinstance(part, torch.nn.Embedding)]
    looked_up = {id(weight) for weight in embeddings} - {
        id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Linear)
    }
    total = 0.0
    for name, parameter in model.named_parameters():
        if id(parameter) in looked_up:
            continue
        share = min(1.0, chosen / len(parameter)) if name in experts and isinstance(chosen, int) else 1.0
        total += share * parameter.numel() * (6 if parameter.requires_grad else 4)
    return total


def copies_of(resolved: Resolved) -> int:
    """How many copies of the trained weights the plugins of ``resolved`` hold."""
    return sum(getattr(plugin.component.factory, "weights_copies", 0) for plugin in resolved.plugins)


def state_bytes(resolved: Resolved, model: torch.nn.Module | None = None) -> float:
    """What the optimizer keeps for each element that it steps, found out by a step of a small weight.

    With a ``model``, for an element of its trained parameters on average: some kinds may have less state than others.
    As much as AdamW's where that cannot be found out.
    """
    elements: dict[ParameterKind, int] = {}
    for described in describe_parameters(model).values() if model is not None else ():
        elements[described.kind] = elements.get(described.kind, 0) + math.prod(described.shape)
    elements = elements or {"matrix": 1}
    return sum(_state_bytes(resolved, kind) * count for kind, count in elements.items()) / sum(elements.values())


def _state_bytes(resolved: Resolved, kind: ParameterKind) -> float:
    weight = torch.nn.Parameter(torch.zeros(128, 128))
    groups = [{"params": [weight], "lr": 1e-3, "weight_decay": 0.0}]
    context = OptimizerContext(
        param_groups=groups,
        device=weight.device,
        bit_training=resolved.core.bit_training,
        described={weight: ParameterDescription("weight", (128, 128), kind)},
    )
    optimizer = resolved.components["optimizer"].build(context, torch.optim.Optimizer)
    if type(optimizer).__module__.startswith("bitsandbytes"):
        # Two moments of a byte, with a scale for 256 elements; paged ones can be in host memory.
        return 0.0 if getattr(optimizer, "is_paged", False) else 2 + 2 * 4 / 256
    weight.grad = torch.zeros_like(weight)
    try:
        with torch.random.fork_rng(devices=[]):
            optimizer.step()
    except Exception:  # of an optimizer that is not made for one weight on a CPU
        return 8.0
    states = [one for one in optimizer.state[weight].values() if isinstance(one, torch.Tensor) and one.dim()]
    return sum(math.prod(one.shape) * one.element_size() for one in states) / weight.numel()
