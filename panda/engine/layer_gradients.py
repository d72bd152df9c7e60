"""The gradients of whole layers under ZeRO-3: reduced in one collective when the backward pass of a layer is over.

DeepSpeed (0.19.8) has a hook for each weight, which copies the gradient into a bucket; when the bucket is full it cuts
each gradient into the ranks' parts, and adds each part that arrives to a sum of its own. With 24 layers of nine weights
the device waits for the host for a quarter of the time (two H100s, 2026-11-27). Here the trained weights of a layer
have no hooks, and a layer is one copy, one collective and one addition. As in DeepSpeed, gradients are divided by the
number of ranks in the type of the weights, added over ranks in that type, and over micro batches in the type of the
sums. On two ranks numbers are the same to the bit; of more, a collective adds those of another message in another
order. Weights outside of layers are as before. Can go when DeepSpeed does so.

All ranks reduce at the same points, since they run the same layers: where a layer's backward is over, whether its
weights have gradients or not. Those without one, such as experts that no token chose, count as zero. (DeepSpeed would
keep the sum of the step before, and wait for ranks that have a gradient.) Only where a weight is used outside of its
layer, on some ranks and not on others, do ranks wait for each other in vain, as they do with DeepSpeed.

Streams. All this is queued on DeepSpeed's stream for reductions, after what has been computed, so its own reductions
come before or after it, and its end of a backward pass waits for both. What is sent lies in memory that all layers have
in common, in which the collective also writes the sum: the next layer's gradients are copied there by the same stream,
later. The gradients themselves are memory of the computation. They are held until the computation waits for the copy,
which it does at the end of the next layer; so those of two layers are alive. At the end of a backward pass DeepSpeed's
host waits for the stream, which leaves the device without work where the next micro batch begins. Here the computation
waits for it, and reads the sums later.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from panda.engine.deepspeed_config import SMALLEST_BUCKET
from panda.engine.layer_weights import as_one
from panda.engine.layer_weights import queued_on


class LayerGradients:
    """Reduces the gradients of ``layers``, and adds them to what DeepSpeed's ``optimizer`` of ZeRO-3 keeps of them.

    Leaves to DeepSpeed what it offloads or treats in another way, and weights that two layers have.
    """

    def __init__(self, layers: list[torch.nn.Module], optimizer: Any, device: torch.device) -> None:
        self.optimizer = optimizer
        self.stream: Any = optimizer.reduce_and_partition_stream
        self.computed: Any = torch.cuda.Event() if self.stream is not None else None  # type: ignore[no-untyped-call]
        self.packed: Any = torch.cuda.Event() if self.stream is not None else None  # type: ignore[no-untyped-call]
        self.messages = _messages(layers, optimizer) if _applies(optimizer) else {}
        self.current: torch.nn.Module | None = None
        """The layer that is in its backward pass."""
        self.reduced = set[torch.nn.Module]()
        """Those that were reduced since the last backward pass."""
        self.held: list[torch.Tensor] = []
        """Gradients that the stream may still read."""
        if self.messages:
            # Asks autograd for each weight whether it will have a gradient, in each backward pass. Only a pass that was
            # not begun by DeepSpeed's engine needs the answer.
            optimizer.should_refresh_expected_hook_count = lambda: False
            if self.stream is not None:
                self.stream.synchronize = lambda: torch.cuda.current_stream().wait_stream(self.stream)
            _make_room(optimizer, [*self.messages.values()], device)
            end = optimizer.independent_gradient_partition_epilogue

            def end_backward() -> None:
                self._reduce_the_rest()
                end()
                self.held = []

            optimizer.independent_gradient_partition_epilogue = end_backward

    def begin(self, layer: torch.nn.Module) -> None:
        """Call it where the backward pass of ``layer`` begins: that of the one before it is over."""
        if self.current is not None:
            self._reduce(self.current)
        self.current = layer

    def _reduce_the_rest(self) -> None:
        """At the end of a backward pass."""
        if self.current is not None:
            self._reduce(self.current)
        self.current = None
        # Layers that are used in other ways than one after the other can get gradients later.
        for layer, message in self.messages.items():
            if any(parameter.grad is not None for parameter in message.parameters):
                self._reduce(layer)
        if self.optimizer.micro_step_id == 0:
            with queued_on(self.stream, self.computed):
                for layer in self.messages.keys() - self.reduced:
                    torch._foreach_zero_(self.messages[layer].sums)
        self.reduced.clear()

    def _reduce(self, layer: torch.nn.Module) -> None:
        message = self.messages.get(layer)
        if message is None:
            return
        gradients = message.take()
        if self.stream is not None:
            self.packed.wait()
        self.held = gradients
        with torch.no_grad(), queued_on(self.stream, self.computed):
            torch.cat(gradients, 1, out=message.memory)
            if self.stream is not None:
                self.packed.record()
            parts = message.reduce()
            if self.optimizer.micro_step_id == 0 and layer not in self.reduced:
                torch._foreach_copy_(message.sums, parts)
            else:
                torch._foreach_add_(message.sums, parts)
        self.reduced.add(layer)


class _Message:
    """The gradients of a layer's trained weights, in the order of DeepSpeed's sums, which are one tensor.

    Each is cut into parts of the same length, one for each rank, of which the last is filled up with zeros: the shards
    of its weight. ``memory`` [ranks, elements of a rank] holds the parts of all weights, rank by rank.
    """

    def __init__(self, parameters: list[Any], sums: list[torch.Tensor]) -> None:
        self.parameters = parameters
        self.group = parameters[0].ds_process_group
        self.ranks, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.sizes = [len(each) for each in sums]
        together = as_one(sums)
        self.sums = sums if together is None else [together]
        """[elements of a rank]: what all parts are added to, or one for each weight if they are not neighbours."""
        self.memory = torch.empty(0)

    def take(self) -> list[torch.Tensor]:
        """[ranks, elements of a rank] of each weight: its gradient, which the parameter has no longer, and zeros."""
        gradients = []
        for parameter, size in zip(self.parameters, self.sizes, strict=True):
            if parameter.grad is None:
                gradient = torch.zeros(self.ranks * size, dtype=parameter.dtype, device=self.memory.device)
            else:
                gradient = parameter.grad.reshape(-1)
                if padding := self.ranks * size - len(gradient):
                    gradient = torch.nn.functional.pad(gradient, (0, padding))
            gradients.append(gradient.view(self.ranks, size))
            parameter.grad = None
        return gradients

    def reduce(self) -> list[torch.Tensor]:
        """The means over the ranks of what they have in ``memory``, as parts for ``sums``."""
        own = self.memory[self.rank]
        # torch 2.13 calls it so, and warns each time of the name that all others have.
        reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce(own, self.memory.div_(self.ranks).view(-1), group=self.group)
        return [own] if len(self.sums) == 1 else list(torch.split_with_sizes(own, self.sizes))


def _applies(optimizer: Any) -> bool:
    """Whether DeepSpeed's ``optimizer`` reduces gradients in its usual way, and keeps the sums on the device."""
    from deepspeed.runtime.torch_autocast import is_autocast_initialized

    usual = type(optimizer).__name__ == "DeepSpeedZeroOptimizer_Stage3" and optimizer.reduce_scatter
    return usual and not (
        optimizer.offload_optimizer
        or optimizer.zenflow
        or optimizer.use_muon
        or optimizer.all2all_process_group is not None
        or optimizer.sequence_parallel_size > 1
        or is_autocast_initialized()
    )


def _messages(layers: list[torch.nn.Module], optimizer: Any) -> dict[torch.nn.Module, _Message]:
    """For each of ``layers`` that has some, the gradients that DeepSpeed has a hook for. Removes the hooks."""
    hooks = {id(handle.hooks_dict_ref()): handle for handle in optimizer._grad_acc_hooks}
    users = Counter(id(parameter) for layer in layers for parameter in layer.parameters())
    stepped = [parameter for group in optimizer.fp16_groups for parameter in group]
    sums = optimizer.grad_partitions_flat_buffer.split([parameter.partition_numel() for parameter in stepped])
    places = {id(parameter): place for place, parameter in enumerate(stepped)}
    messages: dict[torch.nn.Module, _Message] = {}
    for layer in layers:
        mine: list[Any] = [
            parameter
            for parameter in layer.parameters()
            if id(parameter) in places
            and users[id(parameter)] == 1
            and parameter.dtype == optimizer.communication_data_type
            and id(parameter._post_accumulate_grad_hooks) in hooks
        ]
        if mine:
            mine.sort(key=lambda parameter: places[id(parameter)])
            messages[layer] = _Message(mine, [sums[places[id(parameter)]] for parameter in mine])
            for parameter in mine:
                hooks[id(parameter._post_accumulate_grad_hooks)].remove()
    return messages


def _make_room(optimizer: Any, messages: list[_Message], device: torch.device) -> None:
    """Give ``messages`` memory in common, of the largest one, and make DeepSpeed's bucket as small as the rest needs.

    A gradient that is larger than the bucket is reduced from where it lies.
    """
    taken = {id(parameter) for message in messages for parameter in message.parameters}
    left = sum(each.ds_numel for group in optimizer.fp16_groups for each in group if id(each) not in taken)
    optimizer.reduce_bucket_size = max(1, min(optimizer.reduce_bucket_size, SMALLEST_BUCKET, left))
    for bucket in optimizer.ipg_buckets.values():
        if bucket.buffer is not None:
            bucket.buffer = bucket.buffer.new_empty(optimizer.reduce_bucket_size)
    elements = max(message.ranks * sum(message.sizes) for message in messages)
    memory = torch.empty(elements, dtype=optimizer.communication_data_type, device=device)
    for message in messages:
        message.memory = memory[: message.ranks * sum(message.sizes)].view(message.ranks, -1)
