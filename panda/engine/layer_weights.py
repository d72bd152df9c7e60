"""The weights of whole layers under ZeRO-3: gathered a layer ahead of where they are needed.

DeepSpeed (0.19.8) keeps account of each weight by itself: it takes a millisecond of the host for each layer and pass,
and in a 1.3B the device waits for the host a third of the time (two H100s, 2026-11-26). Here a layer's weights are one
message for each type that they have, frozen and trained ones apart: 101 MB take 0.25 ms so, and 0.53 as seven messages,
on the device and on the host (two H100s, 2026-11-27). Weights outside of layers are as before. Weights
that all ranks keep change in each step. They too are gathered afterwards in one message: with adapters a 7B has 448
such weights, and DeepSpeed would send as many messages.

What a rank sends is not copied together first: the trained weights of a layer are neighbours in DeepSpeed's tensor of
all of them, and the frozen ones are made neighbours at the start. What arrives lies rank by rank, in memory that all
layers have in common. One kernel copies it from there into a tensor of the layer's own, and its weights are views of
that one.

Streams. Collective and copy are queued on one stream, so the memory of what arrives is free again when the next
collective begins. That stream waits for what has been computed before it gathers anything. A layer's own tensor is
memory of that stream, so that of a layer that was released before can be used again. Computation waits for an event
after the copy. What autograd saves of a weight is the parameter itself, or a view that keeps the layer's tensor: right
in any case. NCCL never writes to that tensor: its watchdog may keep what a collective writes until it has looked, every
100 ms, and that would be layers that were released.
"""

from __future__ import annotations

from collections import defaultdict
from collections import deque
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from panda.weights.nested import tensors_in

AHEAD = 2
"""Layers that may be queued on the device before the host waits."""
ALIGNED = 128
"""Elements to a multiple of which a weight begins: compiled code and kernels expect 16 bytes."""


class LayerWeights:
    """Gathers the weights of ``layers``, given in the order in which they run, and releases them.

    A layer's weights are there during its forward, and from when the gradient of its result is known until that of the
    layer before is. Any other order of layers is right too, and gathers on demand. ``begin`` is called where the
    backward pass of a layer begins.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Iterable[torch.nn.Module],
        optimizer: Any,
        device: torch.device,
        begin: Callable[[torch.nn.Module], None],
    ) -> None:
        self.begin = begin
        stepped = [parameter for group in optimizer.fp16_groups for parameter in group]
        places = {id(parameter): place for place, parameter in enumerate(stepped)}
        self.layers = [_Layer(module, places, device) for module in layers]
        self.present = set[_Layer]()
        """The layers whose weights are gathered, or are being gathered."""
        self.in_backward: _Layer | None = None
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.computed: Any = torch.cuda.Event() if self.stream is not None else None  # type: ignore[no-untyped-call]
        self.queued = deque[Any]()
        """Events after each of the last layers."""
        with queued_on(self.stream, self.computed):
            share_arrivals([message for layer in self.layers for message in layer.messages], device)
        # A forward pass may have had no backward pass, and the weights that it left may have changed.
        model.register_forward_pre_hook(lambda *_: self.release_all())
        for number, layer in enumerate(self.layers):
            before = self.layers[number - 1] if number else None
            after = self.layers[number + 1] if number + 1 < len(self.layers) else None
            self._follow(layer, before, after)
        self._gather_kept_at_once(model, optimizer.parameter_offload, places, device)

    def _gather_kept_at_once(
        self, model: torch.nn.Module, offload: Any, places: dict[int, int], device: torch.device
    ) -> None:
        """After a step, release all weights, and gather those that all ranks keep in one message, but no layers."""
        persistent: list[Any] = offload.persistent_parameters
        kept = _Weights(persistent, places, device)
        in_layers = _Weights([each for layer in self.layers for each in layer.kept], places, device)
        known = {id(each) for layer in self.layers for each in layer.module.parameters()}
        others = [("", each) for each in model.parameters() if id(each) not in known]
        outside = SimpleNamespace(named_parameters=lambda recurse: others, ds_external_parameters=tuple)

        def release() -> None:
            self.release_all()
            in_layers.release()
            offload.get_param_coordinator().release_and_reset_all(outside)

        offload.partition_all_parameters = release
        if persistent:
            gather_some = persistent[0].all_gather

            def gather(param_list: Any = None, *more: Any, **named: Any) -> Any:
                if param_list is not persistent or any(each.ds_status is not kept.away for each in persistent):
                    return gather_some(param_list, *more, **named)
                self._gather(kept)
                self._arrive(kept)
                return None

            persistent[0].all_gather = gather

    def _follow(self, layer: _Layer, before: _Layer | None, after: _Layer | None) -> None:
        """Hook into ``layer``, which runs between ``before`` and ``after``."""
        versions: dict[int, int] = {}

        def begin_backward(_: torch.Tensor) -> None:
            if self.in_backward is layer:
                return
            if self.in_backward is None:
                # For the first layer, after which no other one's backward begins.
                torch.autograd.Variable._execution_engine.queue_callback(self.release_all)
            elif self.in_backward in self.present:
                self.release(self.in_backward)
            self.in_backward = layer
            self.need(layer)
            self.fetch(before)
            self.begin(layer.module)

        def begin_forward(module: torch.nn.Module, inputs: Any, named: Any) -> None:
            versions.clear()
            versions.update((id(each), each._version) for each in tensors_in((inputs, named)) if each.requires_grad)
            self.need(layer)
            if self.in_backward is None:  # else the layer is computed again, and the one after was just released
                self.fetch(after)

        def end_forward(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            # Not those that it was given and has not changed: their gradients are those of an earlier layer's results.
            results = [
                each for each in tensors_in(output) if each.requires_grad and versions.get(id(each)) != each._version
            ]
            for result in results:
                result.register_hook(begin_backward)  # type: ignore[no-untyped-call]
            # The last layer's backward comes next, or that of a layer which was computed again.
            if (after or not results) and self.in_backward is not layer:
                self.release(layer)

        layer.module.register_forward_pre_hook(begin_forward, with_kwargs=True)
        layer.module.register_forward_hook(end_forward)

    def fetch(self, layer: _Layer | None) -> None:
        """Begin to gather the weights of ``layer``, unless they are there."""
        if layer is not None and layer not in self.present:
            self._gather(layer)
            self.present.add(layer)

    def need(self, layer: _Layer) -> None:
        """Let what is computed from now on have the weights of ``layer``."""
        self._stay_near()
        self.fetch(layer)
        self._arrive(layer)
        if missing := [parameter for parameter in layer.kept if parameter.ds_status is layer.away]:
            missing[0].all_gather(missing)

    def release(self, layer: _Layer) -> None:
        """Take the weights of ``layer`` away. No later work on the device may need them."""
        self.present.remove(layer)
        self._arrive(layer)  # those that were fetched and not needed are on their way
        layer.release()

    def release_all(self) -> None:
        """Take away what is left after a backward pass, or of one that did not come."""
        self.in_backward = None
        for layer in list(self.present):
            self.release(layer)

    def _gather(self, weights: _Weights) -> None:
        with torch.no_grad(), queued_on(self.stream, self.computed):
            weights.gather()
            if self.stream is not None:
                weights.copied.record()

    def _arrive(self, weights: _Weights) -> None:
        """Give the weights that are on their way to their parameters, and let the current stream wait for them."""
        if weights.coming:
            if self.stream is not None:
                weights.copied.wait()
            weights.take()

    def _stay_near(self) -> None:
        """Wait until the device has no more than ``AHEAD`` layers to compute."""
        if self.stream is not None:
            full = len(self.queued) > AHEAD
            event = self.queued.popleft() if full else torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            if full:
                event.synchronize()
            event.record()
            self.queued.append(event)


@contextmanager
def queued_on(stream: Any, computed: Any) -> Iterator[None]:
    """Queue what follows on ``stream``, after what has been computed, which the event ``computed`` says."""
    if stream is None:
        yield
        return
    computed.record()
    computed.wait(stream)
    with torch.cuda.stream(stream):
        yield


class _Message:
    """Weights of one type, of which each rank has a shard, and which one collective gathers.

    What a rank sends is its shards, one after the other; DeepSpeed has padded the last rank's to the length of the
    others'.
    """

    def __init__(self, parameters: list[Any], device: torch.device) -> None:
        shards = [parameter.ds_tensor for parameter in parameters]
        self.parameters, self.device, self.kind = parameters, device, shards[0].dtype
        self.group = parameters[0].ds_process_group
        self.ranks = dist.get_world_size(self.group)
        self.sizes = [shard.numel() for shard in shards]
        whole = [-(-self.ranks * size // ALIGNED) * ALIGNED for size in self.sizes]
        *begins, self.elements = accumulate(whole, initial=0)
        """Where each weight begins in the tensor of all, and how long that is."""
        self.gathered = [((self.ranks, size), (size, 1), begin) for size, begin in zip(self.sizes, begins, strict=True)]
        shapes = [parameter.ds_shape for parameter in parameters]
        strides = [torch.empty(shape, device="meta").stride() for shape in shapes]
        self.weights = list(zip(shapes, strides, begins, strict=True))
        self.arrivals: torch.Tensor | None = None
        """[ranks, elements of a rank]: what the collective writes; None: a tensor of its own each time."""
        self.addresses: list[int] = []
        self.neighbours: torch.Tensor | None = None
        """[elements of a rank]: the shards at ``addresses``, if they are neighbours."""

    def shard(self) -> torch.Tensor:
        """[elements of a rank]: this rank's shards, which are copied only where they are not neighbours in memory.

        Something may have given them other memory since the last time, such as DeepSpeed's loading of a checkpoint.
        """
        shards = [parameter.ds_tensor for parameter in self.parameters]
        addresses = [shard.data_ptr() for shard in shards]
        if addresses != self.addresses:
            self.addresses, self.neighbours = addresses, as_one(shards)
        flat = torch.cat(shards) if self.neighbours is None else self.neighbours
        return flat.to(self.device, non_blocking=True)

    def gather(self) -> list[torch.Tensor]:
        """The weights, which the current stream gathers; on one rank its shards, as they are."""
        if self.ranks == 1:
            shards = [parameter.ds_tensor.to(self.device, non_blocking=True) for parameter in self.parameters]
            places = zip(shards, self.weights, strict=True)
            return [shard.as_strided(shape, stride) for shard, (shape, stride, _) in places]
        shard, arrivals = self.shard(), self.arrivals
        if arrivals is None:
            arrivals = torch.empty(self.ranks, len(shard), dtype=self.kind, device=self.device)
        _all_gather(arrivals, shard, self.group)
        whole = torch.empty(self.elements, dtype=self.kind, device=self.device)
        gathered = [whole.as_strided(*place) for place in self.gathered]
        torch.split_with_sizes_copy(arrivals, self.sizes, dim=1, out=gathered)
        return [whole.as_strided(*place) for place in self.weights]


def _all_gather(gathered: torch.Tensor, shard: torch.Tensor, group: Any) -> None:
    """Gather ``shard`` [elements] of all ranks in ``gathered`` [ranks, elements], in the order of the current stream.

    Used with torch 2.11 on GPUs. NCCL runs on that stream, or on one of its own, and then each waits for the other.
    """
    # torch 2.13 calls it so, and warns each time of the name that all others have.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered.view(-1), shard, group=group)


def as_one(shards: list[torch.Tensor]) -> torch.Tensor | None:
    """``shards`` as one tensor [elements] in the same memory; None if they do not lie in it one after the other."""
    storage, end = shards[0].untyped_storage().data_ptr(), shards[0].data_ptr()
    for shard in shards:
        if shard.untyped_storage().data_ptr() != storage or shard.data_ptr() != end:
            return None
        end += shard.nbytes
    return shards[0].as_strided((sum(len(shard) for shard in shards),), (1,))


def _lay_together(shards: list[torch.Tensor]) -> None:
    """Make ``shards`` neighbours in memory, on their device. Others must not have views of them."""
    first = shards[0]
    together = torch.empty(
        sum(len(shard) for shard in shards), dtype=first.dtype, device=first.device, pin_memory=first.is_pinned()
    )
    torch.cat(shards, out=together)
    end = 0
    for shard in shards:
        begin, end = end, end + len(shard)
        shard.data = together[begin:end]
    if first.is_cuda:
        torch.cuda.empty_cache()  # blocks of single weights do not serve the next layer's


def share_arrivals(messages: list[_Message], device: torch.device) -> None:
    """Let ``messages`` arrive in memory that they have in common: of the largest one."""
    messages = [message for message in messages if message.ranks > 1]
    sizes = [message.ranks * sum(message.sizes) * message.kind.itemsize for message in messages]
    memory = torch.empty(max(sizes, default=0), dtype=torch.uint8, device=device)
    for message, size in zip(messages, sizes, strict=True):
        message.arrivals = memory[:size].view(message.kind).view(message.ranks, -1)


class _Weights:
    """Weights that DeepSpeed has partitioned, and that are gathered and released together.

    ``places``: of those that the optimizer steps, by identity, their order in its memory, which is that of all ranks.
    """

    def __init__(self, parameters: Iterable[Any], places: dict[int, int], device: torch.device) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        self.there, self.away = ZeroParamStatus.AVAILABLE, ZeroParamStatus.NOT_AVAILABLE
        kinds: dict[tuple[torch.dtype, bool], list[Any]] = defaultdict(list)
        for parameter in parameters:
            kinds[parameter.ds_tensor.dtype, id(parameter) in places].append(parameter)
        for (_, stepped), some in kinds.items():
            if stepped:
                some.sort(key=lambda parameter: places[id(parameter)])
        self.messages = [_Message(some, device) for some in kinds.values()]
        self.parameters = [parameter for message in self.messages for parameter in message.parameters]
        self.nothing = [torch.empty(0, dtype=each.ds_tensor.dtype, device=device) for each in self.parameters]
        self.coming: list[torch.Tensor] = []
        """The weights that are on their way."""
        self.copied: Any = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        """Happens when they have come."""

    def gather(self) -> None:
        """Begin to gather the weights, on the current stream."""
        self.coming = [weight for message in self.messages for weight in message.gather()]

    def take(self) -> None:
        """Give the parameters the weights that are on their way."""
        for parameter, weight in zip(self.parameters, self.coming, strict=True):
            parameter.data = weight
            parameter.ds_status = self.there
        self.coming = []

    def release(self) -> None:
        """Leave the parameters empty, as DeepSpeed does."""
        for parameter, nothing in zip(self.parameters, self.nothing, strict=True):
            parameter.data = nothing
            parameter.ds_status = self.away


class _Layer(_Weights):
    """Those of a layer that are not kept by all ranks. The frozen ones become neighbours in memory."""

    def __init__(self, module: torch.nn.Module, places: dict[int, int], device: torch.device) -> None:
        parameters: list[Any] = list(module.parameters())
        self.module = module
        self.kept = [parameter for parameter in parameters if parameter.ds_persist]
        super().__init__((parameter for parameter in parameters if not parameter.ds_persist), places, device)
        for message in self.messages:
            shards = [parameter.ds_tensor for parameter in message.parameters]
            stepped = id(message.parameters[0]) in places
            if message.ranks > 1 and not stepped and as_one(shards) is None:
                _lay_together(shards)
