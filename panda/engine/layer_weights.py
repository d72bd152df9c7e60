"""The weights of whole layers under ZeRO-3: gathered a layer ahead of where they are needed.

DeepSpeed (0.19.8) keeps account of each weight by itself: it takes a millisecond of the host for each layer and pass,
and in a 1.3B the device waits for the host a third of the time (two H100s, 2026-11-26). Here it is a few calls a layer.
Gradients and weights outside of layers are as before. Weights that all ranks keep change in each step. They too are
gathered afterwards in one message: with adapters a 7B has 448 such weights, and DeepSpeed would send as many messages.

Gathered weights are views of one tensor, in memory of the stream of the gathers. That stream waits for what has been
computed before it gathers anything, so the memory of a layer that was released before can be used again. What autograd
saves of a weight is the parameter itself, or a view that keeps the tensor: right in any case.
"""

from __future__ import annotations

from collections import defaultdict
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager

from panda.weights.nested import tensors_in

AHEAD = 2
"""Layers that may be queued on the device before the host waits."""
ALIGNED = 128
"""Elements to a multiple of which a weight begins: compiled code and kernels expect 16 bytes."""
SEPARATE = 16
"""A layer with at most this many weights gathers each in a call of its own. What one call for several gathers stays in
memory until NCCL's watchdog looks, every 100 ms (torch 2.11; one H100, 2026-11-26): 2 GiB of layers that were released
in a 1.3B, and 9 in a 7B."""


class LayerWeights:
    """Gathers the weights of ``layers``, given in the order in which they run, and releases them.

    A layer's weights are there during its forward, and from when the gradient of its result is known until that of the
    layer before is. Any other order of layers is right too, and gathers on demand.
    """

    def __init__(
        self, model: torch.nn.Module, layers: Iterable[torch.nn.Module], offload: Any, device: torch.device
    ) -> None:
        self.layers = [_Layer(module, device) for module in layers]
        self.present: dict[_Layer, _Gather] = {}
        """The layers whose weights are gathered, or are being gathered."""
        self.in_backward: _Layer | None = None
        self.queued = deque[Any]()
        """Events after each of the last layers."""
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        # A forward pass may have had no backward pass, and the weights that it left may have changed.
        model.register_forward_pre_hook(lambda *_: self.release_all())
        for number, layer in enumerate(self.layers):
            before = self.layers[number - 1] if number else None
            after = self.layers[number + 1] if number + 1 < len(self.layers) else None
            self._follow(layer, before, after)
        self._gather_kept_at_once(model, offload, device)

    def _gather_kept_at_once(self, model: torch.nn.Module, offload: Any, device: torch.device) -> None:
        """After a step, release all weights, and gather those that all ranks keep in one message, but no layers."""
        persistent: list[Any] = offload.persistent_parameters
        kept = _Weights(persistent, device)
        in_layers = _Weights([each for layer in self.layers for each in layer.kept], device)
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
                with torch.no_grad():
                    kept.take(kept.gather().arrived())
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
        if layer is None or layer in self.present:
            return
        with torch.no_grad(), self._on_own_stream():
            self.present[layer] = layer.gather()

    def need(self, layer: _Layer) -> None:
        """Let what is computed from now on have the weights of ``layer``."""
        self._stay_near()
        self.fetch(layer)
        self.present[layer].arrive(layer)

    def release(self, layer: _Layer) -> None:
        """Take the weights of ``layer`` away. No later work on the device may need them."""
        self.present.pop(layer).arrive(layer)  # those that were fetched and not needed are on their way
        layer.release()

    def release_all(self) -> None:
        """Take away what is left after a backward pass, or of one that did not come."""
        self.in_backward = None
        for layer in list(self.present):
            self.release(layer)

    def _stay_near(self) -> None:
        """Wait until the device has no more than ``AHEAD`` layers to compute."""
        if self.stream is not None:
            self.queued.append(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
            self.queued[-1].record()
            if len(self.queued) > AHEAD:
                self.queued.popleft().synchronize()

    def _on_own_stream(self) -> AbstractContextManager[Any]:
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)


class _Gather:
    """Weights of a layer on their way, as views of what they are gathered into."""

    def __init__(self, works: list[Any], views: list[torch.Tensor]) -> None:
        self.works = works
        self.views = views

    def arrived(self) -> list[torch.Tensor]:
        """The weights, for which the current stream waits; none the second time."""
        for work in self.works:
            work.wait()
        views, self.works, self.views = self.views, [], []
        return views

    def arrive(self, layer: _Layer) -> None:
        """Give the weights to the parameters of ``layer``, once, and let it have those that all ranks keep."""
        if missing := [parameter for parameter in layer.kept if parameter.ds_status is layer.away]:
            missing[0].all_gather(missing)
        if self.views:
            layer.take(self.arrived())


class _Weights:
    """Weights that DeepSpeed has partitioned, and that are gathered and released together."""

    def __init__(self, parameters: Iterable[Any], device: torch.device) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        self.device = device
        self.there, self.away = ZeroParamStatus.AVAILABLE, ZeroParamStatus.NOT_AVAILABLE
        by_kind: dict[torch.dtype, list[Any]] = defaultdict(list)
        for parameter in parameters:
            by_kind[parameter.ds_tensor.dtype].append(parameter)
        self.by_kind = dict(by_kind)
        self.parameters = [parameter for some in self.by_kind.values() for parameter in some]
        self.nothing = [torch.empty(0, dtype=each.ds_tensor.dtype, device=device) for each in self.parameters]

    def gather(self) -> _Gather:
        """Begin to gather the weights, on the current stream."""
        works: list[Any] = []
        views: list[torch.Tensor] = []
        for kind, parameters in self.by_kind.items():
            group = parameters[0].ds_process_group
            ranks = dist.get_world_size(group)
            shards = [parameter.ds_tensor.to(self.device, non_blocking=True) for parameter in parameters]
            if ranks == 1:
                views += [_whole(shard, parameter) for shard, parameter in zip(shards, parameters, strict=True)]
                continue
            places, end = [], 0
            for shard in shards:
                places.append((end, ranks * shard.numel()))
                end += -(-ranks * shard.numel() // ALIGNED) * ALIGNED
            tensor = torch.empty(end, dtype=kind, device=self.device)
            targets = [tensor.narrow(0, *place) for place in places]
            # Gloo, of the CPU, does not gather several in one call.
            at_once = self.device.type == "cuda" and len(parameters) > SEPARATE
            with _coalescing_manager(group, self.device, async_ops=True) if at_once else nullcontext() as together:
                for shard, target in zip(shards, targets, strict=True):
                    work = dist.all_gather_into_tensor(target, shard, group=group, async_op=True)
                    works += [] if at_once else [work]
            works += [together] if at_once else []
            views += [_whole(target, parameter) for target, parameter in zip(targets, parameters, strict=True)]
        return _Gather(works, views)

    def take(self, views: list[torch.Tensor]) -> None:
        """Give the parameters their weights."""
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view
            parameter.ds_status = self.there

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


def _whole(flat: torch.Tensor, parameter: Any) -> torch.Tensor:
    """The weight in ``flat``, which has padding at its end."""
    return flat.narrow(0, 0, parameter.ds_numel).view(parameter.ds_shape)
