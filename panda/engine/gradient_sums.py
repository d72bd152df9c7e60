"""The fp32 sums of bf16 gradients, in one pass over memory for each micro batch.

For bf16 in ZeRO stage 1, DeepSpeed (``BF16_Optimizer`` of 0.19.8) converts each gradient to fp32, adds the copy to a
sum that it has set to zero, and converts weights by torch's copy between types: 0.3 of the 2.8 s of a step of a 7B, 2 x
2048 tokens and 8 micro batches on an H200 (2026-11-26). Here the first gradient of a step is written, and the others
are added, by one kernel each. All numbers stay the same, except on one rank, where the sums are not rounded to bf16
again (``_to_reduce``), and where a parameter has a gradient on some ranks only, as an expert can (see
``backward_epilogue``). Can go when DeepSpeed does so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch

from panda.engine.casting import cast_into
from panda.engine.memory_parts import REDUCED_AT_ONCE


def sum_in_one_pass(optimizer: Any) -> None:
    """Make ``optimizer``, as ``deepspeed.initialize`` returned it, sum gradients so, if it is that wrapper."""
    if type(optimizer).__name__ != "BF16_Optimizer":
        return
    for method in (_update_hp_grad, backward_epilogue, clear_hp_grads, update_lp_params):
        setattr(optimizer, method.__name__, MethodType(method, optimizer))
    optimizer.get_grads_for_norm = partial(_gradients, optimizer, optimizer.get_grads_for_norm)
    optimizer.get_grads_for_reduction = partial(_to_reduce, optimizer)


def _update_hp_grad(optimizer: Any, parameter: Any, group: int, index: int, clear_lp_grads: bool) -> None:
    """Add the gradient of ``parameter``, number ``index`` of ``group``, to its sum."""
    total, summed = optimizer.fp32_groups_gradients[group][index], optimizer.fp32_groups_has_gradients[group]
    cast_into(total, parameter.grad.reshape(-1), add=summed[index])
    parameter._hp_grad = total
    summed[index] = True


def backward_epilogue(optimizer: Any, **_: Any) -> None:
    """After each backward pass: parameters that had no gradient since the last step have a sum of zero.

    It counts as a sum, since other ranks may have had a gradient: DeepSpeed would leave the parameter out of the norm
    and the clipping of this rank alone, and the ranks would move the weights differently.
    """
    for totals, summed in zip(optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True):
        for index in (index for index, is_summed in enumerate(summed) if not is_summed):
            totals[index].zero_()
            summed[index] = True


def clear_hp_grads(optimizer: Any) -> None:
    """The next gradients begin sums of their own."""
    for totals, summed in zip(optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True):
        summed[:] = [False] * len(totals)


def _to_reduce(optimizer: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """What ranks add up, in tensors that are reduced one at a time; nothing where a rank has all data to itself.

    DeepSpeed converts all sums to bf16 for that, and back, on one rank too: they are rounded for nothing, in several
    passes over memory, and the copy takes 13 GB for a moment (7B). The parts here have more than the 500 million
    elements from which on it reduces a tensor without another copy.
    """
    import torch.distributed as dist

    if all(dist.get_world_size(group) == 1 for group in optimizer.real_dp_process_group):
        return [], {}
    return [part for sums in optimizer.fp32_groups_gradients_flat for part in sums.split(REDUCED_AT_ONCE)], {}


def _gradients(optimizer: Any, of_norm: Callable[[], Any], for_clipping: bool = False) -> Any:
    """What the norm of the gradients is taken of, or what is scaled down to clip them: this rank's part of the sums.

    DeepSpeed would scale all sums on every rank, a parameter at a time, of which the rank steps its part and forgets
    the rest: of the 448 adapters of a 7B these are 448 small operations, launched while the GPU waits.
    """
    return list(optimizer.fp32_groups_gradient_flat_partition) if for_clipping else of_norm()


@torch.no_grad()
def update_lp_params(optimizer: Any) -> None:
    """Set the weights of the forward pass to the masters, and gather them from the other ranks."""
    import torch.distributed as dist
    from deepspeed.runtime.utils import all_gather_dp_groups

    for parts, master, group in zip(
        optimizer.bf16_partitioned_groups,
        optimizer.fp32_groups_flat_partition,
        optimizer.real_dp_process_group,
        strict=True,
    ):
        cast_into(parts[dist.get_rank(group)], master.detach())
    all_gather_dp_groups(
        groups_flat=optimizer.bf16_groups_flat,
        partitioned_param_groups=optimizer.bf16_partitioned_groups,
        dp_process_group=optimizer.real_dp_process_group,
        start_alignment_factor=optimizer.nccl_start_alignment_factor,
        allgather_bucket_size=optimizer.allgather_bucket_size,
    )
