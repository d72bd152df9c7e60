"""The weights of whole layers under ZeRO-3: gathered a layer ahead of where they are needed.

DeepSpeed (0.19.8) keeps account of each weight by itself: it takes a millisecond of the host for each layer and pass,
and in a 1.3B the device waits for the host a third of the time (two H100s, 2026-11-26). Here a layer's weights are one
collective (coalesced.py) for each type that they have. Weights outside of layers are as before. Weights that all ranks
keep change in each step. They too are gathered afterwards in one collective: with adapters a 7B has 448 such weights,
and DeepSpeed would send as many messages.

Where there is memory for them, some layers stay gathered through a step: from forward to backward, and from one micro
batch to the next. Each gather holds back the computation beside it, which has fewer multiprocessors in the meantime.
Weights do not change between the first backward pass of a step and its end; before that, a forward pass gathers all of
them.

Streams. Collectives are queued on one stream, which waits for what has been computed before it gathers anything. What
arrives is memory of that stream, so that of a layer that was released before can be used again. The stream also waits
where a layer is released: before torch gives free memory back to a device that is full, it waits for the stream that
the memory is of, and for no other (2.11). Computation waits for an event after the collective. What autograd saves of a
weight is the parameter itself, or a view that keeps the layer's tensor: right in any case.
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

from panda.engine.coalesced import all_gather
from panda.weights.nested import tensors_in

AHEAD = 2
"""Layers that may be queued on the device before the host waits."""
ALIGNED = 128
"""Elements to a multiple of which a weight begins: compiled code and kernels expect 16 bytes."""


class LayerWeights:
    """Gathers the weights of ``layers``, given in the order in which they run, and releases them.

    A layer's weights are there during its forward, and from when the gradient of its result is known until that of the
    layer before is; those of the last ``staying`` layers stay until the end of a step. Any other order of layers is
    right too, and gathers on demand. ``begin`` is called where the backward pass of a layer begins.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Iterable[torch.nn.Module],
        optimizer: Any,
        device: torch.device,
        begin: Callable[[torch.nn.Module], None],
        staying: int,
    ) -> None:
        self.begin = begin
        self.layers = [_Layer(module, device) for module in layers]
        self.present = set[_Layer]()
        """The layers whose weights are gathered, or are being gathered."""
        self.staying = set(self.layers[max(0, len(self.layers) - staying) :])
        self.in_step = False
        """Whether the gradients of a step are being summed, so that weights stay as they are until its end."""
        self.in_backward: _Layer | None = None
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.computed: Any = torch.cuda.Event() if self.stream is not None else None  # type: ignore[no-untyped-call]
        self.queued = deque[Any]()
        """Events after each of the last layers."""
        model.register_forward_pre_hook(lambda *_: self.begin_pass())
        for number, layer in enumerate(self.layers):
            before = self.layers[number - 1] if number else None
            after = self.layers[number + 1] if number + 1 < len(self.layers) else None
            self._follow(layer, before, after)
        self._gather_kept_at_once(model, optimizer.parameter_offload, device)

    def _gather_kept_at_once(self, model: torch.nn.Module, offload: Any, device: torch.device) -> None:
        """After a step, release all weights, and gather those that all ranks keep by one collective, but no layers."""
        persistent: list[Any] = offload.persistent_parameters
        kept = _Weights(persistent, device)
        in_layers = _Weights([each for layer in self.layers for each in layer.kept], device)
        known = {id(each) for layer in self.layers for each in layer.module.parameters()}
        others = [("", each) for each in model.parameters() if id(each) not in known]
        outside = SimpleNamespace(named_parameters=lambda recurse: others, ds_external_parameters=tuple)

        def release() -> None:
            self.in_step = False
            self.release_all(but=set())
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
                torch.autograd.Variable._execution_engine.queue_callback(self.end_backward)
            elif self.in_backward in self.present and self.in_backward not in self.staying:
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
            if (after or not results) and self.in_backward is not layer and not self.stays(layer):
                self.release(layer)

        layer.module.register_forward_pre_hook(begin_forward, with_kwargs=True)
        layer.module.register_forward_hook(end_forward)

    def fetch(self, layer: _Layer | None) -> None:
        """Begin to gather the weights of ``layer``, unless they are there."""
        if layer in self.present and layer.was_partitioned():
            self.present.remove(layer)
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
        if self.stream is not None:
            after_computed(self.stream, self.computed)

    def stays(self, layer: _Layer) -> bool:
        """Whether ``layer`` is there until weights change: for a backward pass, or for another micro batch."""
        return layer in self.staying and (self.in_step or torch.is_grad_enabled())

    def begin_pass(self) -> None:
        """A forward pass may have had no backward pass, and before a step the weights that it left may have changed."""
        self.release_all(but=self.staying if self.in_step else set())

    def end_backward(self) -> None:
        """Take away what is left of a backward pass, but for the layers that stay."""
        self.in_step = True
        self.release_all(but=self.staying)

    def release_all(self, but: set[_Layer]) -> None:
        """Take away all that was gathered, but for some layers."""
        self.in_backward = None
        for layer in self.present - but:
            self.release(layer)

    def _gather(self, weights: _Weights) -> None:
        with torch.no_grad(), queued_on(self.stream, self.computed):
            weights.gather()
            if self.stream is not None:
                weights.arrived.record()

    def _arrive(self, weights: _Weights) -> None:
        """Give the weights that are on their way to their parameters, and let the current stream wait for them."""
        if weights.coming:
            if self.stream is not None:
                weights.arrived.wait()
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
    after_computed(stream, computed)
    with torch.cuda.stream(stream):
        yield


def after_computed(stream: Any, computed: Any) -> None:
    """Let what is queued on ``stream`` from now on wait for what has been computed, by the event ``computed``."""
    computed.record()
    computed.wait(stream)


class _Message:
    """Weights of one type, of which each rank has a shard, and which one collective gathers.

    DeepSpeed has padded the last rank's shards to the length of the others'.
    """

    def __init__(self, parameters: list[Any], device: torch.device) -> None:
        shards = [parameter.ds_tensor for parameter in parameters]
        self.parameters, self.device, self.kind = parameters, device, shards[0].dtype
        self.group = parameters[0].ds_process_group
        self.ranks = dist.get_world_size(self.group)
        sizes = [self.ranks * shard.numel() for shard in shards]
        *begins, self.elements = accumulate((-(-size // ALIGNED) * ALIGNED for size in sizes), initial=0)
        """Where each weight begins in the tensor of all, and how long that is."""
        self.gathered = [((size,), (1,), begin) for size, begin in zip(sizes, begins, strict=True)]
        shapes = [parameter.ds_shape for parameter in parameters]
        strides = [torch.empty(shape, device="meta").stride() for shape in shapes]
        self.weights = list(zip(shapes, strides, begins, strict=True))

    def gather(self) -> list[torch.Tensor]:
        """The weights, which the current stream gathers; on one rank its shards, as they are."""
        shards = [parameter.ds_tensor.to(self.device, non_blocking=True) for parameter in self.parameters]
        if self.ranks == 1:
            places = zip(shards, self.weights, strict=True)
            return [shard.as_strided(shape, stride) for shard, (shape, stride, _) in places]
        whole = torch.empty(self.elements, dtype=self.kind, device=self.device)
        all_gather([whole.as_strided(*place) for place in self.gathered], shards, self.group)
        return [whole.as_strided(*place) for place in self.weights]


class _Weights:
    """Weights that DeepSpeed has partitioned, and that are gathered and released together."""

    def __init__(self, parameters: Iterable[Any], device: torch.device) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        self.there, self.away = ZeroParamStatus.AVAILABLE, ZeroParamStatus.NOT_AVAILABLE
        kinds: dict[torch.dtype, list[Any]] = defaultdict(list)
        for parameter in parameters:
            kinds[parameter.ds_tensor.dtype].append(parameter)
        self.messages = [_Message(some, device) for some in kinds.values()]
        self.parameters = [parameter for message in self.messages for parameter in message.parameters]
        self.nothing = [torch.empty(0, dtype=each.ds_tensor.dtype, device=device) for each in self.parameters]
        self.coming: list[torch.Tensor] = []
        """The weights that are on their way."""
        self.arrived: Any = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
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

    def was_partitioned(self) -> bool:
        """Whether something took the gathered weights away, such as DeepSpeed's ``GatheredParameters``."""
        return not self.coming and any(parameter.ds_status is self.away for parameter in self.parameters[:1])

    def release(self) -> None:
        """Leave the parameters empty, as DeepSpeed does."""
        for parameter, nothing in zip(self.parameters, self.nothing, strict=True):
            parameter.data = nothing
            parameter.ds_status = self.away


class _Layer(_Weights):
    """Those of a layer that are not kept by all ranks."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        parameters: list[Any] = list(module.parameters())
        self.module = module
        self.kept = [parameter for parameter in parameters if parameter.ds_persist]
        super().__init__((parameter for parameter in parameters if not parameter.ds_persist), device)
