"""A step that is taken and undone before the first one: whether a GPU has the memory for it is then known.

It is a step that is judged not to be taken (``deciding``), so weights, optimizer and random numbers stay as they are,
and DeepSpeed's wrappers drop the gradients as after any step. What such a step changes besides is put back here.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from panda.engine.engine import Engine
from panda.engine.steps import BatchType
from panda.engine.steps import LossSum
from panda.engine.steps import Statistics
from panda.engine.wrappers import WRAPPERS
from panda.engine.wrappers import wrapper_of

COUNTERS = ("micro_steps", "global_steps", "global_samples", "skipped_steps")
"""Attributes of DeepSpeed's engine (0.19.8) that count steps; checkpoints hold all but the first."""
HAS_LINKED_STATES = "_hp_optimizer_states_linked"
"""The attribute of a wrapper that says whether it has linked parameters to optimizer states, as its first step does."""


def what_forbids(engine: Engine) -> str:
    """Why no step can be rehearsed, as a part of a sentence; empty if one can."""
    if not engine.judges:
        return "ZenFlow steps weights outside of the optimizer"
    zero = engine.config.get("zero_optimization", {})
    if any((zero.get(key) or {}).get("device") == "nvme" for key in ("offload_optimizer", "offload_param")):
        return "each step reads and writes what is on NVMe"
    name = type(engine.optimizer).__name__
    if not isinstance(engine.optimizer, torch.optim.Optimizer) and name not in WRAPPERS:
        return f"panda does not know DeepSpeed's {name}"
    return ""


def rehearse(
    engine: Engine,
    micro_batches: list[BatchType],
    loss_sum: LossSum,
    statistics: Callable[[Any, BatchType], Statistics] | None = None,
    *,
    state_bytes: float = 0.0,
) -> int:
    """Take the step of ``micro_batches`` and undo it. Every rank has to call it, with as many.

    An optimizer that has no state yet will have ``state_bytes`` for each element that it steps: so much is held in the
    meantime. Returns the bytes that torch allocated on the GPU at most; 0 on a CPU. Afterwards everything is as it was
    before, to the bit: weights, optimizer, gradients, buffers, random numbers, counters and the loss scale of fp16.
    """
    device = engine.processes.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with _undone(engine):
        states = torch.empty(_state_to_come(engine, state_bytes), dtype=torch.uint8, device=device)
        engine.step(micro_batches, loss_sum, statistics, judge=lambda loss, grad_norm: False)
        del states
    if not on_gpu:
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    # The memory that stands for states would otherwise be cut up for activations before the states come.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def _state_to_come(engine: Engine, state_bytes: float) -> int:
    """Bytes on the device of the states that the optimizer makes in its first step; 0 once it has some."""
    if engine.own_optimizer.state:
        return 0
    stepped = [tensor for tensor, *_ in wrapper_of(engine.optimizer).live(engine.optimizer)]
    return round(state_bytes * sum(each.numel() for each in stepped if each.device == engine.processes.device))


@contextmanager
def _undone(engine: Engine) -> Iterator[None]:
    """Afterwards all that a step which is not taken changes is as it was before, unless it fails."""
    on_part, engine.on_part = engine.on_part, None
    scaler = getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)
    counts = {name: getattr(engine.deepspeed, name) for name in COUNTERS}
    scale = dict(vars(scaler)) if scaler is not None else {}
    has_linked = getattr(engine.optimizer, HAS_LINKED_STATES, None)
    buffers = [
        (part._buffers, name, buffer, buffer.clone())
        for part in engine.module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    yield
    engine.on_part = on_part
    with torch.no_grad():
        for held, name, buffer, value in buffers:  # such as running means, which a forward pass moves
            held[name] = buffer.copy_(value)
        _forget_sums(engine.optimizer)
    vars(engine.deepspeed).update(counts)
    if scaler is not None:
        vars(scaler).update(scale)
    if has_linked is not None:
        setattr(engine.optimizer, HAS_LINKED_STATES, has_linked)


def _forget_sums(optimizer: Any) -> None:
    """Make gradients zero that DeepSpeed keeps until others replace them.

    A parameter without a gradient in the first step, such as an expert that no token chose, would be given its gradient
    of the rehearsal (ZeRO-3, and with `offload_optimizer`, of 0.19.8).
    """
    masters = [
        *getattr(optimizer, "fp32_partitioned_groups_flat", ()),
        *getattr(optimizer, "single_partition_of_fp32_groups", ()),
    ]
    kept = [getattr(optimizer, "grad_partitions_flat_buffer", None), *(master.grad for master in masters)]
    for each in kept:
        if each is not None:
            each.zero_()
    getattr(optimizer, "accumulated_grads_in_cpu", {}).clear()
