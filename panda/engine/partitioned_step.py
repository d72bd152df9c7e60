"""The optimizer step under ZeRO-3, without what DeepSpeed does for each weight or for each pair of groups.

Of the 448 adapters of a 7B on two cards a step took 0.081 s, where it takes 0.013 in ZeRO-1 (H200, 2026-11-26), and the
device waited for the host. For each of 32 groups DeepSpeed (0.19.8) steps the optimizer with all groups, of which the
others are empty: torch's AdamW is entered 1,024 times. It takes the norm of each gradient by itself, adds up those of
each group over the ranks in a message of its own, and then waits for the device; and it makes a view for each weight
that is the one which the weight has. All numbers stay the same, but on a GPU torch takes the norms of many tensors by
another kernel, which rounds differently. Can go when DeepSpeed does so.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist


def step_with_few_calls(optimizer: Any) -> None:
    """Make ``optimizer``, as ``deepspeed.initialize`` returned it, step so, if it is that of ZeRO-3.

    Optimizers of others than torch are stepped as before: they may keep account of steps for all groups.
    """
    if not hasattr(optimizer, "parameter_offload") or optimizer.offload_optimizer or optimizer.zenflow:
        return
    optimizer._unflatten_partitioned_parameters = partial(
        _look_at_shards, optimizer, optimizer._unflatten_partitioned_parameters
    )
    groups, model_parallel = optimizer.sub_group_process_groups, optimizer.model_parallel_group
    if (
        all(group is groups[0] for group in groups)
        and (model_parallel is None or dist.get_world_size(model_parallel) == 1)
        and not optimizer.use_muon
    ):
        optimizer._get_norm_groups = partial(_norms, optimizer, groups[0])
    if type(optimizer.optimizer).__module__.startswith("torch.optim.") and not optimizer.torch_autocast_gradscaler:
        optimizer._optimizer_step = partial(_step_group, optimizer)


@torch.no_grad()
def _norms(optimizer: Any, ranks: Any) -> list[torch.Tensor]:
    """For each group the norm of its gradients over all ranks; -1 where it is not finite, as DeepSpeed expects it."""
    from deepspeed.runtime.zero.utils import get_norm_dtype

    groups = [optimizer.averaged_gradients[number] for number in range(len(optimizer.fp16_groups))]
    norms = torch._foreach_norm([gradient for group in groups for gradient in group], 2.0, dtype=get_norm_dtype())
    squares = torch.stack(norms).square().split([len(group) for group in groups])  # type: ignore[no-untyped-call]
    sums = torch.stack([each.sum() for each in squares])
    dist.all_reduce(sums, group=ranks)
    of_groups = sums.sqrt()
    return list(of_groups.where(of_groups.isfinite(), -1.0).unbind())


def _step_group(optimizer: Any, number: int) -> None:
    """Step sub-group ``number`` by an optimizer that has no other groups in the meantime."""
    own = optimizer.optimizer
    groups = own.param_groups
    group = groups[optimizer.sub_group_to_group_id[number]]
    group["params"] = [optimizer.fp32_partitioned_groups_flat[number]]
    own.param_groups = [group]
    try:
        own.step()
    finally:
        own.param_groups = groups
        group["params"] = []


def _look_at_shards(optimizer: Any, unflatten: Any, number: int) -> None:
    """Give the shards of sub-group ``number`` their places in the tensor of all, unless they have them."""
    flat = optimizer.fp16_partitioned_groups_flat[number]
    place, size = flat.data_ptr(), flat.element_size()
    for shard in optimizer.fp16_partitioned_groups[number]:
        if shard.data_ptr() != place:
            unflatten(number)
            return
        place += shard.numel() * size
