"""Continues a checkpoint with another number of ranks or ZeRO stage: moves each element to its new place.

DeepSpeed has its universal checkpoint for this: a conversion on disk first, then a loader. In 0.19.8 that
loader gives all parameter groups the options of the first under ZeRO-3, and lets all sub-groups share one
count of steps; and with ``round_robin_gradients`` the conversion is wrong. Here a checkpoint says which
stretches of which parameters each rank's flat tensors hold (see ``parameter_layouts``), and each rank copies
what it now holds from all of them. Options and learning rates are those of the new run. Can go when
DeepSpeed's loader is right and needs no conversion.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from panda.engine.checkpoints.weights import checkpoint_weights
from panda.engine.engine import Engine
from panda.engine.parameter_layouts import check_values
from panda.engine.parameter_layouts import read_layout
from panda.engine.trained_state import trained_state
from panda.engine.wrappers import WRAPPERS
from panda.engine.wrappers import Saved
from panda.registry import UserError
from panda.registry.contexts import TensorLayout

_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter")
"""Attributes of the scalers of all wrappers. The step at which the scale was last lowered decides when it is raised."""


def describe_layout(engine: Engine) -> dict[str, Any] | None:
    """The layout of this rank's optimizer as plain objects; None if panda does not know DeepSpeed's wrapper."""
    try:
        wrapper, tensors = read_layout(engine.module, engine.optimizer)
    except UserError:
        return None
    return {
        "ranks": engine.processes.world_size,
        "wrapper": wrapper.name,
        "tensors": [
            {
                "parameters": list(layout.parameters),
                "segments": [[each.parameter, each.start, each.length, each.source] for each in layout.segments],
            }
            for layout in tensors
        ],
    }


def layout_file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"layout-{rank:05d}.json"


@torch.no_grad()
def redistribute(engine: Engine, checkpoint: Path) -> None:
    """Restore weights, and this rank's master weights and moments. Every rank must call this."""
    if engine.processes.tensor_ranks > 1:
        raise UserError(
            f"{checkpoint}: with tensor_parallel_size a run continues only with the same number of processes and the"
            " same `zero_stage`. Give those that it had."
        )
    _, tensors = read_layout(engine.module, engine.optimizer)
    stretches = _Stretches(checkpoint)
    for layout in tensors:
        _fill(layout, stretches, engine.own_optimizer)
    state = trained_state(engine.module)
    for name, stored in checkpoint_weights(checkpoint).items():
        target = state[name]
        if not hasattr(target, "ds_tensor"):
            target.copy_(stored.read())
    engine.take_partitions_from(tensors)
    check_values(engine.module, tensors)
    _carry_loss_scale(stretches, engine.optimizer)


class _Stretches:
    """All stretches of parameters in the optimizer files of a checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._of: dict[str, list[tuple[int, int, int, Saved]]] = defaultdict(list)
        layouts = sorted(checkpoint.glob("layout-*.json"))
        described = json.loads(layouts[0].read_text(encoding="utf-8")) if layouts else None
        if described is None or len(layouts) != described["ranks"]:
            raise UserError(
                f"{checkpoint}: it does not describe the layout of its optimizer, so it continues only with the same"
                " number of ranks, ZeRO stage and `deepspeed_config`."
            )
        self.wrapper = wrapper = WRAPPERS[described["wrapper"]]
        for rank, file in enumerate(layouts if wrapper.partitioned else layouts[:1]):
            described = json.loads(file.read_text(encoding="utf-8"))
            tensors = wrapper.saved(checkpoint, rank, described["tensors"])
            for saved, tensor in zip(tensors, described["tensors"], strict=True):
                self._check(saved)
                for parameter, start, length, source in tensor["segments"]:
                    self._of[tensor["parameters"][parameter]].append((source, length, start, saved))

    def _check(self, saved: Saved) -> None:
        # Every rank checks the files of all ranks, so that all stop. DeepSpeed 0.19.8 removes the padding at the end
        # from the masters of ZeRO-1 and 2, and leaves it on the moments.
        for key, value in saved.state.items():
            is_scalar = isinstance(value, (int, float)) or (torch.is_tensor(value) and value.dim() == 0)
            fits = torch.is_tensor(value) and value.is_floating_point() and value.numel() >= saved.master.numel()
            if not (is_scalar or fits):
                raise UserError(
                    f"{self.checkpoint}: {key} of this optimizer does not have one number per element, and cannot be"
                    " spread again. Continue with the same number of ranks and the same ZeRO stage."
                )

    def overlapping(self, name: str, source: int, length: int) -> Iterator[tuple[int, int, int, Saved]]:
        """The pieces of ``length`` elements of ``name`` from ``source`` on: first element, length, start, tensor."""
        covered = 0
        for first, count, start, saved in self._of[name]:
            left, right = max(first, source), min(first + count, source + length)
            if left < right:
                covered += right - left
                yield left, right - left, start + left - first, saved
        if covered != length:
            raise UserError(f"{self.checkpoint}: the checkpoint is of another model: it lacks part of {name}.")


def _fill(layout: TensorLayout, stretches: _Stretches, optimizer: torch.optim.Optimizer) -> None:
    """Fill the tensor of ``layout``, and its state in ``optimizer``, from the checkpoint."""
    tensor = layout.tensor
    state: dict[str, Any] = {}
    for segment in layout.segments:
        name = layout.parameters[segment.parameter]
        for source, length, start, saved in stretches.overlapping(name, segment.source, segment.length):
            at = segment.start + source - segment.source
            _flat(tensor)[at : at + length] = _flat(saved.master)[start : start + length].to(tensor)
            for key, value in saved.state.items():
                if not torch.is_tensor(value) or value.dim() == 0:
                    state[key] = value.clone() if torch.is_tensor(value) else value
                    continue
                into = state.setdefault(key, torch.zeros_like(tensor, dtype=value.dtype))
                _flat(into)[at : at + length] = _flat(value)[start : start + length].to(into)
    if state:
        group = optimizer.param_groups[0]
        if torch.is_tensor(state.get("step")) and (group.get("fused") or group.get("capturable")):
            state["step"] = state["step"].to(tensor.device)
        optimizer.state[tensor] = state


def _carry_loss_scale(stretches: _Stretches, optimizer: Any) -> None:
    """Restore the dynamic loss scale of fp16, if the checkpoint and ``optimizer`` have one."""
    scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    saved = stretches.wrapper.loss_scale(stretches.checkpoint)
    if scaler is not None and all(key in saved and hasattr(scaler, key) for key in _LOSS_SCALE):
        for key in _LOSS_SCALE:
            setattr(scaler, key, saved[key])


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1)
