"""Where parameters lie in the tensors that DeepSpeed passes to an optimizer: the only place that knows.

Each of DeepSpeed's wrappers flattens parameters in its own way, and none says how. So their attributes
are read, as DeepSpeed 0.19.8 names them, and checked: the ranks' segments must tile every trainable
parameter, and hold its values. (Its own ``safe_get_full_fp32_param`` is wrong with ``round_robin_gradients``.)
Can go when DeepSpeed states the layout.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from panda.engine.processes import Processes
from panda.registry import UserError
from panda.registry.contexts import ParameterLayout
from panda.registry.contexts import Segment
from panda.registry.contexts import TensorLayout

Parameters = list[torch.nn.Parameter]
Read = Iterator[tuple[torch.Tensor, Parameters, list[Segment]]]
"""For each tensor: the parameters that the ranks' tensors hold together, and the segments of this rank."""


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
                "optimizer: norms of layers need master weights in fp32, and DeepSpeed keeps them in"
                f" {layout.tensor.dtype}. Remove the key of `deepspeed_config` that asks for it, or use"
                " `optimizer: adamw`."
            )
    sharded = is_sharded(wrapper)
    check_values(module, tensors)
    _check_cover(module, _gather(tensors, processes) if sharded else [_described(tensors)])

    def sum_over_shards(tensor: torch.Tensor) -> torch.Tensor:
        if not sharded and processes.tensor_ranks == 1:
            return tensor
        # Under optimizer offload the step runs on the CPU, but the collective still on the GPU.
        return processes.sum_(tensor.to(processes.device), "all" if sharded else "tensor").to(tensor.device)

    return ParameterLayout(tuple(tensors), sum_over_shards)


def read_layout(module: torch.nn.Module, optimizer: Any) -> tuple[str, list[TensorLayout]]:
    """The name of the wrapper around ``optimizer`` ("none" without one), and the layout of this rank's tensors.

    The layout is not checked. Raises UserError if the wrapper is not known.
    """
    wrapper = "none" if isinstance(optimizer, torch.optim.Optimizer) else type(optimizer).__name__
    if wrapper not in _READERS:
        raise UserError(
            f"optimizer: it needs to know where each parameter lies, and DeepSpeed has put them into a {wrapper}, which"
            " panda does not know. Remove the key of `deepspeed_config` that asks for it, or use `optimizer: adamw`."
        )
    read, _ = _READERS[wrapper]
    names = {parameter: name for name, parameter in module.named_parameters()}
    return wrapper, [
        TensorLayout(tensor, tuple(names[parameter] for parameter in parameters), tuple(segments))
        for tensor, parameters, segments in read(optimizer)
    ]


def is_sharded(wrapper: str) -> bool:
    """Whether each rank holds parts of the parameters in this wrapper, and not all of them."""
    _, sharded = _READERS[wrapper]
    return sharded


def _whole(optimizer: Any) -> Read:
    """fp32 without ZeRO: nothing is wrapped."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, [parameter], [Segment(0, 0, parameter.numel(), 0)]


def _whole_masters(optimizer: Any) -> Read:
    """16 bit without ZeRO (``FP16_UnfusedOptimizer``): an fp32 copy of each parameter."""
    for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for parameter, master in zip(parameters, masters, strict=True):
            yield master, [parameter], [Segment(0, 0, parameter.numel(), 0)]


def _zero_1_and_2(optimizer: Any) -> Read:
    """A rank's part of each group, its parameters in an order of DeepSpeed's own, with padding between."""
    for tensor, parameters, offsets, group in zip(
        optimizer.single_partition_of_fp32_groups,
        optimizer.round_robin_bit16_groups,
        optimizer.round_robin_bit16_offsets,
        optimizer.real_dp_process_group,
        strict=True,
    ):
        yield tensor, parameters, _partition(tensor.numel(), parameters, offsets, dist.get_rank(group))


def _bf16_zero_1(optimizer: Any) -> Read:
    """A rank's part of each group, in bf16 with gradients in fp32 (``BF16_Optimizer``)."""
    for tensor, parameters, group in zip(
        optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, optimizer.real_dp_process_group, strict=True
    ):
        offsets = _ends(parameter.numel() for parameter in parameters)[:-1]
        yield tensor, parameters, _partition(tensor.numel(), parameters, offsets, dist.get_rank(group))


def _zero_3(optimizer: Any) -> Read:
    """A rank's part of each parameter, one after the other. The last rank's part is padded with arbitrary values."""
    for tensor, parameters, group in zip(
        optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, optimizer.sub_group_process_groups, strict=True
    ):
        rank = dist.get_rank(group)
        starts = _ends(parameter.partition_numel() for parameter in parameters)
        segments = []
        for number, (parameter, start) in enumerate(zip(parameters, starts[:-1], strict=True)):
            source = rank * parameter.partition_numel()
            length = min(parameter.partition_numel(), parameter.ds_numel - source)
            if length > 0:
                segments.append(Segment(number, start, length, source))
        yield tensor, parameters, segments


_READERS: dict[str, tuple[Callable[[Any], Read], bool]] = {
    "none": (_whole, False),
    "FP16_UnfusedOptimizer": (_whole_masters, False),
    "DeepSpeedZeroOptimizer": (_zero_1_and_2, True),
    "BF16_Optimizer": (_bf16_zero_1, True),
    "DeepSpeedZeroOptimizer_Stage3": (_zero_3, True),
}
"""By the wrapper's class: how to read it, and whether each rank holds parts of the parameters only."""


def _partition(size: int, parameters: Parameters, offsets: list[int], rank: int) -> list[Segment]:
    """The segments in part ``rank``, of ``size`` elements, of parameters that begin at ``offsets`` of the whole."""
    begin, end = rank * size, (rank + 1) * size
    segments = []
    for number, (parameter, offset) in enumerate(zip(parameters, offsets, strict=True)):
        left, right = max(offset, begin), min(offset + parameter.numel(), end)
        if left < right:
            segments.append(Segment(number, left - begin, right - left, left - offset))
    return segments


def _ends(lengths: Iterable[int]) -> list[int]:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return ends


# -- the check --------------------------------------------------------------------------------

Described = list[tuple[tuple[str, ...], list[tuple[str, int, int]]]]
"""For each tensor: its parameters, and for each segment the parameter, its first element in it, its length."""


def _described(tensors: list[TensorLayout]) -> Described:
    return [
        (layout.parameters, [(layout.parameters[s.parameter], s.source, s.length) for s in layout.segments])
        for layout in tensors
    ]


def _gather(tensors: list[TensorLayout], processes: Processes) -> list[Described]:
    """The layouts of the ranks that have the same part of the model."""
    everyone: list[Any] = [None] * processes.world_size
    dist.all_gather_object(everyone, _described(tensors))
    return everyone[processes.tensor_rank :: processes.tensor_ranks]


def _check_cover(module: torch.nn.Module, everyone: list[Described]) -> None:
    """Raise RuntimeError unless the ranks' segments tile each trainable parameter, and their tensors match."""
    together = [[parameters for parameters, _ in rank] for rank in everyone]
    if any(tensors != together[0] for tensors in together):
        raise RuntimeError("DeepSpeed steps other parameters together on one rank than on another.")
    stretches = defaultdict(list)
    for rank in everyone:
        for _, segments in rank:
            for name, source, length in segments:
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
