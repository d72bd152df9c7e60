"""Where parameters lie in the tensors that DeepSpeed passes to an optimizer, checked.

``wrappers`` reads it from DeepSpeed's attributes. Here the ranks' segments must tile every trainable parameter and
hold its values. (DeepSpeed's own ``safe_get_full_fp32_param`` is wrong with ``round_robin_gradients``, 0.19.8.)
Can go when DeepSpeed states the layout.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from panda.engine.exchange import RankExchange
from panda.engine.exchange import Segments
from panda.engine.processes import Processes
from panda.engine.wrappers import Wrapper
from panda.engine.wrappers import wrapper_of
from panda.optim.parameter_kinds import describe_parameters
from panda.registry import UserError
from panda.registry.contexts import ParameterLayout
from panda.registry.contexts import TensorLayout


def layout_of(module: torch.nn.Module, optimizer: Any, processes: Processes) -> ParameterLayout:
    """The layout of ``optimizer``, as ``deepspeed.initialize`` returned it for ``module``.

    Every rank must call this, before the first step. Raises UserError if the optimizer's wrapper is not known
    here, and RuntimeError if DeepSpeed lays parameters out differently than expected.
    """
    wrapper, tensors = read_layout(module, optimizer)
    if getattr(optimizer, "has_moe_layers", False):
        raise UserError("optimizer: the experts of a mixture are spread over different ranks; use `optimizer: adamw`.")
    for layout in tensors:
        if layout.tensor.dtype not in (torch.float32, torch.float64):
            raise UserError(
                "optimizer: norms and whole parameters need master weights in fp32, and DeepSpeed keeps them in"
                f" {layout.tensor.dtype}. Remove the key of `deepspeed_config` that asks for it, or use"
                " `optimizer: adamw`."
            )
    sharded = wrapper.partitioned
    check_values(module, tensors)
    everyone = processes.from_all(_described(tensors)) if sharded else [_described(tensors)] * processes.world_size
    # The ranks that have the same part of the model hold each of its elements once between them.
    alike = everyone[processes.tensor_rank :: processes.tensor_ranks] if sharded else everyone[:1]
    _check_cover(module, alike)
    described = {each.name: each for each in describe_parameters(module).values()}

    def sum_over_shards(tensor: torch.Tensor) -> torch.Tensor:
        if not sharded and processes.tensor_ranks == 1:
            return tensor
        # Under optimizer offload the step runs on the CPU, but the collective still on the GPU.
        return processes.sum_(tensor.to(processes.device), "all" if sharded else "tensor").to(tensor.device)

    segments = [[of_tensor for _, of_tensor in rank] for rank in everyone]
    exchange = RankExchange(tensors, described, segments, processes, partitioned=sharded)
    return ParameterLayout(tuple(tensors), sum_over_shards, described, exchange)


def read_layout(module: torch.nn.Module, optimizer: Any) -> tuple[Wrapper, list[TensorLayout]]:
    """The wrapper around ``optimizer``, and the layout of this rank's tensors.

    The layout is not checked. Raises UserError if the wrapper is not known.
    """
    wrapper = wrapper_of(optimizer)
    names = {parameter: name for name, parameter in module.named_parameters()}
    return wrapper, [
        TensorLayout(tensor, tuple(names[parameter] for parameter in parameters), tuple(segments))
        for tensor, parameters, segments in wrapper.live(optimizer)
    ]


# -- the check --------------------------------------------------------------------------------

Described = list[tuple[tuple[str, ...], Segments]]
"""For each tensor: its parameters, and its segments."""


def _described(tensors: list[TensorLayout]) -> Described:
    return [
        (
            layout.parameters,
            tuple((layout.parameters[s.parameter], s.start, s.length, s.source) for s in layout.segments),
        )
        for layout in tensors
    ]


def _check_cover(module: torch.nn.Module, everyone: list[Described]) -> None:
    """Raise RuntimeError unless the ranks' segments tile each trainable parameter, and their tensors match."""
    together = [[parameters for parameters, _ in rank] for rank in everyone]
    if any(tensors != together[0] for tensors in together):
        raise RuntimeError("DeepSpeed steps other parameters together on one rank than on another.")
    stretches = defaultdict(list)
    for rank in everyone:
        for _, segments in rank:
            for name, _, length, source in segments:
                stretches[name].append((source, length))
    for name, parameter in module.named_parameters():
        covered = 0
        for source, length in sorted(stretches[name]):
            covered = covered + length if source == covered else -1
        if parameter.requires_grad and covered != getattr(parameter, "ds_numel", parameter.numel()):
            raise RuntimeError(
                f"{name}: DeepSpeed's optimizer does not hold each of its elements once, but (first, count):"
                f" {sorted(stretches[name])}. Its layout is not the one that panda knows."
            )


def check_values(module: torch.nn.Module, tensors: list[TensorLayout]) -> None:
    """Raise RuntimeError unless each segment holds the values of its parameter, or their fp32 master weights."""
    parameters = dict(module.named_parameters())
    for layout in tensors:
        flat = layout.tensor.detach().reshape(-1)
        for segment in layout.segments:
            name = layout.parameters[segment.parameter]
            parameter: Any = parameters[name]
            held, first = parameter.detach().reshape(-1), 0
            if hasattr(parameter, "ds_tensor"):  # ZeRO-3 leaves each rank its part only
                held = parameter.ds_tensor
                first = segment.source
            expected = held[segment.source - first : segment.source - first + segment.length]
            found = flat[segment.start : segment.start + segment.length]
            if not torch.equal(found.to(expected), expected):
                raise RuntimeError(
                    f"{name}: elements {segment.source} to {segment.source + segment.length} are not where panda looks"
                    " for them in DeepSpeed's optimizer. Its layout is not the one that panda knows."
                )
