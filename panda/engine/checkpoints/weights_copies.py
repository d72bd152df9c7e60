"""Copies of the trained weights in a checkpoint: each rank writes its part, and reads what it holds now."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from panda.engine.checkpoints.folders import check_contents
from panda.engine.checkpoints.redistribution import layout_file
from panda.engine.checkpoints.weights import checkpoint_weights
from panda.engine.checkpoints.weights import split_dimensions_in
from panda.engine.engine import Engine
from panda.engine.weights_copy import WeightsCopy
from panda.engine.weights_copy import copy_weights
from panda.engine.wrappers import WRAPPERS
from panda.engine.wrappers import wrapper_of
from panda.registry import UserError
from panda.weights.stored_tensor import Weights


def _file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"weights-of-plugins-{rank:05d}.safetensors"


def write_copies(
    engine: Engine, copies: Mapping[str, WeightsCopy], checkpoint: Path, *, evaluated: str | None = None
) -> list[Path]:
    """Write this rank's part of ``copies`` to ``checkpoint``, which describes the layout of the trained weights.

    Returns the files that this rank wrote.
    ``evaluated``: the one that the model is evaluated with, if it is not with the trained weights.
    """
    processes = engine.processes
    if copies and (wrapper_of(engine.optimizer).partitioned or processes.data_rank == 0):
        parts = {
            f"{name}.{number}": tensor.detach().cpu().reshape(-1)
            for name, copied in copies.items()
            for number, tensor in enumerate(copied.tensors)
        }
        facts = {"tensor_ranks": str(processes.tensor_ranks), "evaluated": evaluated or ""}
        save_file(parts, _file(checkpoint, processes.rank), facts)
        return [_file(checkpoint, processes.rank)]
    return []


@torch.no_grad()
def read_copies(engine: Engine, checkpoint: Path, names: Collection[str]) -> dict[str, WeightsCopy]:
    """The copies called ``names`` in ``checkpoint``, of which each rank gets the part that it holds now.

    The bits are those that were written, also on other ranks and in another ZeRO stage.
    """
    if not names:
        return {}
    stretches = _stretches(checkpoint, engine.processes.tensor_rank, engine.processes.tensor_ranks)
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


def _stretches(checkpoint: Path, tensor_rank: int, tensor_ranks: int) -> dict[str, list[Stretch]]:
    """By parameter, the stretches in the files of ``checkpoint`` of the ranks that hold part ``tensor_rank``."""
    found = defaultdict(list)
    first = json.loads(layout_file(checkpoint, 0).read_text(encoding="utf-8"))
    partitioned = WRAPPERS[first["wrapper"]].partitioned
    for rank in range(tensor_rank, first["ranks"] if partitioned else tensor_ranks, tensor_ranks):
        described = json.loads(layout_file(checkpoint, rank).read_text(encoding="utf-8"))
        file = safe_open(_file(checkpoint, rank), framework="pt")
        for number, tensor in enumerate(described["tensors"]):
            for parameter, start, length, source in tensor["segments"]:
                found[tensor["parameters"][parameter]].append((source, length, start, file, number))
    return found


def evaluated_weights(checkpoint: Path) -> tuple[Weights, bool]:
    """The weights that the run was evaluated with at ``checkpoint``, and whether they are others than the trained ones.

    As ``checkpoint_weights`` gives the trained ones.
    """
    trained = checkpoint_weights(checkpoint)
    if not _file(checkpoint, 0).exists():
        return trained, False
    check_contents(checkpoint, sorted([*checkpoint.glob("weights-of-plugins-*"), *checkpoint.glob("layout-*")]))
    facts = safe_open(_file(checkpoint, 0), framework="pt").metadata()  # type: ignore[no-untyped-call]
    name, tensor_ranks = facts["evaluated"], int(facts["tensor_ranks"])
    if not name:
        return trained, False
    shards = [_stretches(checkpoint, rank, tensor_ranks) for rank in range(tensor_ranks)]
    split = split_dimensions_in(checkpoint)

    def read(parameter: str) -> torch.Tensor:
        stored = trained[parameter]
        shape, parts = list(stored.shape), 1
        if parameter in split:
            parts = tensor_ranks
            shape[split[parameter]] //= parts
        whole = []
        for stretches in shards[:parts]:
            part = torch.empty(math.prod(shape))
            if _fill(part, 0, stretches[parameter], name) != len(part):
                raise UserError(f"{checkpoint}: what plugins keep of the weights lacks part of {parameter}.")
            whole.append(part.view(shape))
        return torch.cat(whole, split.get(parameter, 0)).to(stored.dtype)

    return {
        key: replace(stored, read=partial(read, key)) if shards[0].get(key) else stored
        for key, stored in trained.items()
    }, True
