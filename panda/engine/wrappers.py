"""What DeepSpeed puts around an optimizer, and where each such wrapper keeps parameters: in memory, and in checkpoints.

Everything here is read from attributes and files of DeepSpeed 0.19.8 that it does not document. A wrapper that is
not in the table, or a layout that differs, is an error (``parameter_layouts``).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from panda.engine.checkpoints.reading import load_plain
from panda.registry import UserError
from panda.registry.contexts import Segment

Parameters = list[torch.nn.Parameter]
Live = Iterator[tuple[torch.Tensor, Parameters, list[Segment]]]
"""For each tensor: the parameters that the ranks' tensors hold together, and the segments of this rank."""
Described = Iterable[dict[str, Any]]
"""The tensors of a rank as the layout file of a checkpoint describes them."""


@dataclass(frozen=True)
class Saved:
    """One tensor that a rank's optimizer stepped, mapped from a file."""

    master: torch.Tensor
    state: dict[str, Any]


@dataclass(frozen=True)
class Wrapper:
    """One way in which DeepSpeed holds an optimizer."""

    name: str
    """Its class in DeepSpeed; ``none`` where DeepSpeed uses the optimizer as it is."""
    partitioned: bool
    """Whether each rank holds parts of the parameters, and not all of them."""
    live: Callable[[Any], Live]
    """The tensors that the wrapper has this rank's optimizer step."""
    saved: Callable[[Path, int, Described], list[Saved]]
    """The same tensors in a checkpoint, for one rank, in the order in which they are described."""
    loss_scale: Callable[[Path], dict[str, Any]]
    """The attributes of fp16's loss scaler in a checkpoint; empty where there is none."""


def wrapper_of(optimizer: Any) -> Wrapper:
    """The wrapper ``optimizer`` is, as ``deepspeed.initialize`` returned it. Raises UserError if it is not known."""
    name = "none" if isinstance(optimizer, torch.optim.Optimizer) else type(optimizer).__name__
    if name not in WRAPPERS:
        raise UserError(
            f"optimizer: it needs to know where each parameter lies, and DeepSpeed has put them into a {name}, which"
            " panda does not know. Remove the key of `deepspeed_config` that asks for it, or use `optimizer: adamw`."
        )
    return WRAPPERS[name]


# -- in memory


def _live_whole(optimizer: Any) -> Live:
    """fp32 without ZeRO: nothing is wrapped."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, [parameter], [Segment(0, 0, parameter.numel(), 0)]


def _live_masters(optimizer: Any) -> Live:
    """16 bit without ZeRO (``FP16_UnfusedOptimizer``): an fp32 copy of each parameter."""
    for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for parameter, master in zip(parameters, masters, strict=True):
            yield master, [parameter], [Segment(0, 0, parameter.numel(), 0)]


def _zero_1_and_2(optimizer: Any) -> Live:
    """A rank's part of each group, its parameters in an order of DeepSpeed's own, with padding between."""
    for tensor, parameters, offsets, group in zip(
        optimizer.single_partition_of_fp32_groups,
        optimizer.round_robin_bit16_groups,
        optimizer.round_robin_bit16_offsets,
        optimizer.real_dp_process_group,
        strict=True,
    ):
        yield tensor, parameters, _partition(tensor.numel(), parameters, offsets, dist.get_rank(group))


def _bf16_zero_1(optimizer: Any) -> Live:
    """A rank's part of each group, in bf16 with gradients in fp32 (``BF16_Optimizer``)."""
    for tensor, parameters, group in zip(
        optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, optimizer.real_dp_process_group, strict=True
    ):
        offsets = _ends(parameter.numel() for parameter in parameters)[:-1]
        yield tensor, parameters, _partition(tensor.numel(), parameters, offsets, dist.get_rank(group))


def _zero_3(optimizer: Any) -> Live:
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


# -- in checkpoints


def _states(base: dict[str, Any], count: int) -> list[dict[str, Any]]:
    return [base["state"].get(number, {}) for number in range(count)]


def _saved_whole(checkpoint: Path, rank: int, tensors: Described) -> list[Saved]:
    file = load_plain(checkpoint / "mp_rank_00_model_states.pt")
    masters = [file["module"][parameter] for tensor in tensors for parameter in tensor["parameters"]]
    return list(map(Saved, masters, _states(file["optimizer"], len(masters))))


def _saved_masters(checkpoint: Path, rank: int, tensors: Described) -> list[Saved]:
    optimizer = load_plain(checkpoint / "mp_rank_00_model_states.pt")["optimizer"]
    masters = [master for group in optimizer["fp32_groups"] for master in group]
    return list(map(Saved, masters, _states(optimizer["optimizer_state_dict"], len(masters))))


def _saved_parts(masters: str, base: str) -> Callable[[Path, int, Described], list[Saved]]:
    def read(checkpoint: Path, rank: int, tensors: Described) -> list[Saved]:
        (file,) = checkpoint.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        optimizer = load_plain(file)["optimizer_state_dict"]
        found = optimizer[masters]
        return list(map(Saved, found, _states(optimizer[base], len(found))))

    return read


def _no_loss_scale(checkpoint: Path) -> dict[str, Any]:
    return {}


def _loss_scale_of_masters(checkpoint: Path) -> dict[str, Any]:
    held: dict[str, Any] = load_plain(checkpoint / "mp_rank_00_model_states.pt")["optimizer"]
    return held


def _loss_scale_of_parts(checkpoint: Path) -> dict[str, Any]:
    (file,) = checkpoint.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt")
    scaler = load_plain(file)["optimizer_state_dict"].get("loss_scaler")
    return vars(scaler) if scaler is not None else {}


_ZERO_1_2 = _saved_parts("single_partition_of_fp32_groups", "base_optimizer_state")
_ZERO_3 = _saved_parts("fp32_flat_groups", "optimizer_state_dict")

WRAPPERS = {
    wrapper.name: wrapper
    for wrapper in (
        Wrapper("none", False, _live_whole, _saved_whole, _no_loss_scale),
        Wrapper("FP16_UnfusedOptimizer", False, _live_masters, _saved_masters, _loss_scale_of_masters),
        Wrapper("DeepSpeedZeroOptimizer", True, _zero_1_and_2, _ZERO_1_2, _loss_scale_of_parts),
        Wrapper("BF16_Optimizer", True, _bf16_zero_1, _ZERO_1_2, _loss_scale_of_parts),
        Wrapper("DeepSpeedZeroOptimizer_Stage3", True, _zero_3, _ZERO_3, _loss_scale_of_parts),
    )
}
"""Every wrapper that panda knows, by name."""
