"""The gradients of whole layers under ZeRO-3: reduced in one collective when the backward pass of a layer is over.

DeepSpeed (0.19.8) has a hook for each weight, which copies the gradient into a bucket; when the bucket is full it cuts
each gradient into the ranks' parts, and adds each part that arrives to a sum of its own. With 24 layers of nine weights
the device waits for the host for a quarter of the time (two H100s, 2026-11-27). Here the trained weights of a layer
have no hooks, and a layer is one collective (coalesced.py) and one addition. As in DeepSpeed, gradients are added over
ranks in the type of the weights, and over micro batches in that of the sums. They are divided by the number of ranks
between these two, and only those of fp16, which could overflow, before both. On two ranks numbers are the same to the
bit; of more, they are rounded in other places. Weights outside of layers are as before. Can go when DeepSpeed does so.

All ranks reduce at the same points, since they run the same layers: where a layer's backward is over, whether its
weights have gradients or not. Those without one, such as experts that no token chose, count as zero. (DeepSpeed would
keep the sum of the step before, and wait for ranks that have a gradient.) Only where a weight is used outside of its
layer, on some ranks and not on others, do ranks wait for each other in vain, as they do with DeepSpeed.

Streams. All this is queued on DeepSpeed's stream for reductions, after what has been computed, so its own reductions
come before or after it, and its end of a backward pass waits for both. What arrives lies in memory that all layers have
in common: the next layer's arrives there on the same stream, later. The gradients are memory of the computation. They
are held until the computation waits for their reduction, which it does at the end of the next layer; so those of two
layers are alive. At the end of a backward pass DeepSpeed's host waits for the stream, which leaves the device without
work where the next micro batch begins. Here the computation waits for it, and reads the sums later.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from panda.engine.casting import cast_into
from panda.engine.coalesced import reduce_scatter
from panda.engine.deepspeed_config import SMALLEST_BUCKET
from panda.engine.layer_weights import queued_on


class LayerGradients:
    """Reduces the gradients of ``layers``, and adds them to what DeepSpeed's ``optimizer`` of ZeRO-3 keeps of them.

    Leaves to DeepSpeed what it offloads or treats in another way, and weights that two layers have.
    """

    def __init__(self, layers: list[torch.nn.Module], optimizer: Any, device: torch.device) -> None:
        self.optimizer = optimizer
        self.stream: Any = optimizer.reduce_and_partition_stream
        self.computed: Any = torch.cuda.Event() if self.stream is not None else None  # type: ignore[no-untyped-call]
        self.sent: Any = torch.cuda.Event() if self.stream is not None else None  # type: ignore[no-untyped-call]
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
            self.sent.wait()
        self.held = gradients
        with torch.no_grad(), queued_on(self.stream, self.computed):
            factor = message.reduce(gradients)
            if self.stream is not None:
                self.sent.record()
            is_first = self.optimizer.micro_step_id == 0 and layer not in self.reduced
            for total, arrived in zip(message.sums, message.arrived, strict=True):
                cast_into(total, arrived, add=not is_first, factor=factor)
        self.reduced.add(layer)


class _Message:
    """The gradients of a layer's trained weights, in the order of DeepSpeed's sums, which are one tensor.

    Each is cut into parts of the same length, one for each rank, of which the last is filled up with zeros: the shards
    of its weight.
    """

    def __init__(self, parameters: list[Any], sums: list[torch.Tensor]) -> None:
        self.parameters = parameters
        self.group = parameters[0].ds_process_group
        self.ranks = dist.get_world_size(self.group)
        self.sizes = [len(each) for each in sums]
        together = _as_one(sums)
        self.sums = sums if together is None else [together]
        """[elements of a rank]: what all parts are added to, or one for each weight if they are not neighbours."""
        self.parts: list[torch.Tensor] = []
        """[elements of a rank] of each weight: where this rank's part of the sum over ranks arrives."""
        self.arrived: list[torch.Tensor] = []
        """The same, as ``sums`` are."""

    def arrive_in(self, memory: torch.Tensor) -> None:
        """Let the parts arrive in ``memory`` [elements of a rank], one after the other."""
        self.parts = list(torch.split_with_sizes(memory, self.sizes))
        self.arrived = [memory] if len(self.sums) == 1 else self.parts

    def take(self) -> list[torch.Tensor]:
        """[ranks x elements of a rank] of each weight: its gradient, which the parameter has no longer, and zeros."""
        gradients = []
        for parameter, size in zip(self.parameters, self.sizes, strict=True):
            if parameter.grad is None:
                gradient = parameter.ds_tensor.new_zeros(self.ranks * size, device=self.parts[0].device)
            else:
                gradient = parameter.grad.reshape(-1)
                if padding := self.ranks * size - len(gradient):
                    gradient = torch.nn.functional.pad(gradient, (0, padding))
            gradients.append(gradient)
            parameter.grad = None
        return gradients

    def reduce(self, gradients: list[torch.Tensor]) -> float:
        """Let the parts of ``gradients`` arrive. Returns the factor that makes them means over the ranks."""
        divided = gradients[0].dtype == torch.float16
        if divided:
            # Not in place: a gradient may be a view of what the layer before is given.
            gradients = list(torch._foreach_div(gradients, self.ranks))
        reduce_scatter(self.parts, gradients, self.group)
        return 1.0 if divided else 1 / self.ranks


def _as_one(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    """``tensors`` as one tensor [elements] in the same memory; None if they do not lie in it one after the other."""
    storage, end = tensors[0].untyped_storage().data_ptr(), tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.untyped_storage().data_ptr() != storage or tensor.data_ptr() != end:
            return None
        end += tensor.nbytes
    return tensors[0].as_strided((sum(len(tensor) for tensor in tensors),), (1,))


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
    elements = max(sum(message.sizes) for message in messages)
    memory = torch.empty(elements, dtype=optimizer.communication_data_type, device=device)
    for message in messages:
        message.arrive_in(memory[: sum(message.sizes)])
