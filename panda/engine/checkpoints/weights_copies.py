"""Copies of the trained weights in a checkpoint: each rank writes its part, and reads what it holds now."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from panda.engine.checkpoints.redistribution import layout_file
from panda.engine.engine import Engine
from panda.engine.weights_copy import WeightsCopy
from panda.engine.weights_copy import copy_weights
from panda.engine.wrappers import WRAPPERS
from panda.engine.wrappers import wrapper_of
from panda.registry import UserError


def _file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"weights-of-plugins-{rank:05d}.safetensors"


def write_copies(engine: Engine, copies: Mapping[str, WeightsCopy], checkpoint: Path) -> None:
    """Write this rank's part of ``copies`` to ``checkpoint``, which describes the layout of the trained weights."""
    processes = engine.processes
    if copies and (wrapper_of(engine.optimizer).partitioned or processes.data_rank == 0):
        parts = {
            f"{name}.{number}": tensor.detach().cpu().reshape(-1)
            for name, copied in copies.items()
            for number, tensor in enumerate(copied.tensors)
        }
        save_file(parts, _file(checkpoint, processes.rank))


@torch.no_grad()
def read_copies(engine: Engine, checkpoint: Path, names: Collection[str]) -> dict[str, WeightsCopy]:
    """The copies called ``names`` in ``checkpoint``, of which each rank gets the part that it holds now.

    The bits are those that were written, also on other ranks and in another ZeRO stage.
    """
    if not names:
        return {}
    stretches = _stretches(engine, checkpoint)
    found = {name: copy_weights(engine) for name in names}
    for name, copied in found.items():
        for layout, tensor in zip(copied.layouts, copied.tensors, strict=True):
            tensor.zero_()  # what is in no segment is padding
            for segment in layout.segments:
                into = tensor.view(-1)[segment.start : segment.start + segment.length]
                parameter = layout.parameters[segment.parameter]
                if _fill(into, segment.source, stretches[parameter], name) != segment.length:
                    raise UserError(f"{checkpoint}: what plugins keep of the weights lacks part of {parameter}.")
    return found


Stretch = tuple[int, int, int, Any, int]
"""First element in the parameter, length, start in the tensor, the file, the number of the tensor."""


def _fill(into: torch.Tensor, first: int, stretches: list[Stretch], name: str) -> int:
    """Fill ``into``, elements of a parameter from ``first`` on, from the copy ``name``; returns how many were found."""
    covered = 0
    for source, length, start, file, number in stretches:
        left, right = max(source, first), min(source + length, first + len(into))
        if left < right:
            begin = start + left - source
            written = file.get_slice(f"{name}.{number}")
            part = written[begin : begin + right - left]
            into[left - first : right - first] = part.to(into)
            covered += right - left
    return covered


def _stretches(engine: Engine, checkpoint: Path) -> dict[str, list[Stretch]]:
    """By parameter, the stretches in the files of ``checkpoint``."""
    processes = engine.processes
    found = defaultdict(list)
    first = json.loads(layout_file(checkpoint, 0).read_text(encoding="utf-8"))
    partitioned = WRAPPERS[first["wrapper"]].partitioned
    step = processes.tensor_ranks  # neighbouring ranks hold other parts of the model
    ranks = range(processes.tensor_rank, first["ranks"] if partitioned else step, step)
    for rank in ranks:
        described = json.loads(layout_file(checkpoint, rank).read_text(encoding="utf-8"))
        file = safe_open(_file(checkpoint, rank), framework="pt")
        for number, tensor in enumerate(described["tensors"]):
            for parameter, start, length, source in tensor["segments"]:
                found[tensor["parameters"][parameter]].append((source, length, start, file, number))
    return found
