"""Random weights that depend on the seed of a run, on their names and on the kind of device, and on nothing else.

Whatever the ZeRO stage, the rank, the number of ranks, the quantisation and the order of reading, a
parameter gets the same numbers. They are drawn by transformers' own ``_init_weights``, one unit at a
time: a numbered layer, or outside of layers the module that has the parameter. They are drawn on the device
where they are needed: one CPU thread takes minutes for what a GPU draws in a second.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from panda.weights.layer_names import layer_of
from panda.weights.stored_tensor import Weights
from panda.weights.stored_tensor import places_of
from panda.weights.stored_tensor import put
from panda.weights.stored_tensor import weights_of

KEPT = 2**18
"""Elements of a tensor that is kept, once it is drawn, although another unit is read next. Quantisation reads the
matrices of all layers before the norms of the first."""

CPU = torch.device("cpu")


def kind_of(device: torch.device) -> str:
    """What the numbers that are drawn on ``device`` depend on, in words.

    A GPU spreads them over its multiprocessors: with another number of these, they are others (torch 2.13, 2026-11).
    """
    if device.type != "cuda":
        return device.type
    return f"GPU with {torch.cuda.get_device_properties(device).multi_processor_count} multiprocessors"


def initial_weights(module: torch.nn.Module, seed: int, device: torch.device = CPU) -> Weights | None:
    """Every tensor of ``module``, made by ``without_weights``, under its first name: parameters drawn when read.

    Reading the tensors of a unit one after another draws the unit once, in the memory of ``device``, and leaves torch's
    generators as they are. Buffers, which ``module`` has, are read from it. It may be changed before weights are read.
    None where it is no transformers model, or has parameters that its ``_init_weights`` leaves as they are.
    """
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return None
    weights = dict(weights_of(module))
    unset = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    drawing = _Drawing(module, seed, unset, device)
    if not drawing.is_complete():
        return None
    return weights | {name: replace(weights[name], read=partial(drawing.read, name)) for name in unset}


class _Drawing:
    """Draws the parameters ``names`` of ``model``, of transformers, on ``device``.

    It keeps a copy of the model, without weights.
    """

    def __init__(self, model: Any, seed: int, names: list[str], device: torch.device) -> None:
        self._model: Any = copy.deepcopy(model)
        self._places = places_of(self._model)
        self._seed = seed
        self._device = device
        self._units: dict[str, list[str]] = {}
        for name in names:
            self._units.setdefault(_unit_of(name), []).append(name)
        self._drawn: dict[str, torch.Tensor] = {}

    def is_complete(self) -> bool:
        """Whether ``_init_weights`` writes to every parameter. On the meta device, where nothing is drawn."""
        for unit, names in self._units.items():
            before = {name: self._model.get_parameter(name)._version for name in names}
            self._initialise(unit)
            if any(self._model.get_parameter(name)._version == version for name, version in before.items()):
                return False
        return True

    def read(self, name: str) -> torch.Tensor:
        """The parameter ``name``, to keep. Of a unit that was drawn, what has not been read is kept for the next."""
        if name not in self._drawn:
            # frees what is left of another unit before this one is drawn
            self._drawn = {other: tensor for other, tensor in self._drawn.items() if tensor.numel() <= KEPT}
            self._drawn |= self._draw(_unit_of(name))
        return self._drawn.pop(name)

    def _draw(self, unit: str) -> dict[str, torch.Tensor]:
        empty = {name: self._model.get_parameter(name).detach() for name in self._units[unit]}
        for name, tensor in empty.items():
            put(self._places[name], torch.full_like(tensor, math.nan, device=self._device))
        self._initialise(unit)
        drawn = {name: self._model.get_parameter(name).detach() for name in empty}
        for name, tensor in empty.items():
            put(self._places[name], tensor)
        unset = [name for name, tensor in drawn.items() if tensor.sum().isnan()]
        assert not unset, f"{type(self._model).__name__}._init_weights sets only a part of {', '.join(unset)}"
        return drawn

    def _initialise(self, unit: str) -> None:
        """Do to ``unit`` what transformers does to a new model. Writes to the rest, on the meta device, do nothing."""
        digest = hashlib.sha256(f"{self._seed}/{unit}".encode()).digest()
        number = int.from_bytes(digest[:8], "big")
        on_gpu = self._device.type == "cuda"
        with _walking_only_to(unit, self._model), torch.random.fork_rng(devices=[self._device] if on_gpu else []):
            torch.default_generator.manual_seed(number)
            if on_gpu:
                torch.cuda.default_generators[torch.cuda._utils._get_device_index(self._device)].manual_seed(number)
            self._model.initialize_weights()


@contextmanager
def _walking_only_to(unit: str, model: Any) -> Iterator[None]:
    """``model.initialize_weights`` initialises ``unit`` and then the modules around it, and does not look at the rest.

    It would take as long for each of a thousand layers as for all. Modules around the unit take part, since some draw
    parameters of others again, as T5's outermost module does its embedding.
    """
    path = [model]
    for name in unit.split("."):
        if (inner := path[-1]._modules.get(name)) is None:
            break  # the unit is a parameter of this module
        path.append(inner)
    for part in (*path, *path[-1].modules()):
        part._is_hf_initialized = False  # as from_pretrained marks what a checkpoint lacks (transformers 5)
    for outer, inner in pairwise(path):
        outer.children = partial(iter, (inner,))
    try:
        yield
    finally:
        for outer in path[:-1]:
            del outer.children


def _unit_of(name: str) -> str:
    return layer_of(name) or name.rpartition(".")[0]
