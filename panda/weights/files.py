"""Weights in files: read one tensor at a time, and written one file at a time."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from panda.files.terminal import number_of
from panda.registry import UserError
from panda.registry.errors import in_brief
from panda.weights.shards import PICKLES
from panda.weights.shards import SAFETENSORS
from panda.weights.shards import FileNames
from panda.weights.shards import damaged
from panda.weights.shards import index_of
from panda.weights.shards import shards
from panda.weights.stored_tensor import StoredTensor
from panda.weights.stored_tensor import Weights

SHARD_BYTES = 2 * 10**9
"""Bytes of tensors in a file that panda writes, at most; a process holds them until the file is written."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""How the headers of safetensors name types."""


def safetensors_weights(folder: Path, names: FileNames = SAFETENSORS) -> Weights:
    """The tensors of the safetensors files in ``folder`` that have these ``names``; only the headers are read.

    Raises UserError for a file that is missing or damaged.
    """
    weights: dict[str, StoredTensor] = {}
    for file in shards(folder, names):
        with _opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                part = handle.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise UserError(
                        f"{file}: {name} is of type {part.get_dtype()}, which panda does not read. Convert the"
                        f" checkpoint to one of {', '.join(_DTYPES)}."
                    )
                _refuse_twice(name, file, weights)
                weights[name] = StoredTensor(tuple(part.get_shape()), dtype, partial(_read, file, name))
    _check_index(weights, folder, names)
    return weights


def pickled_weights(folder: Path) -> Weights:
    """The tensors of the pickles in ``folder``, mapped and not read. ``weights_only``: no code in them runs."""
    weights: dict[str, StoredTensor] = {}
    for file in shards(folder, PICKLES):
        for name, tensor in load_pickle(file).items():
            weights[name] = StoredTensor(tuple(tensor.shape), tensor.dtype, partial(_itself, tensor))
    _check_index(weights, folder, PICKLES)
    return weights


def load_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The state dict in ``file``, mapped into memory where its format allows that.

    Raises UserError for a file that is damaged, or holds anything but tensors by name.
    """
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file of torch before 1.6 cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:  # torch's own message advises loading it without `weights_only`
        raise damaged(file, "torch's `weights_only` refuses it", "a pickle of tensors only") from problem
    except Exception as problem:  # torch lets the exceptions of its parsers through
        raise damaged(file, in_brief(problem).partition(". ")[0], "a pickle") from problem
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file}: expected a dictionary of tensors by name.")
    return state


def write_weights(weights: Weights, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``weights`` to ``folder`` as transformers does: one safetensors file, or several and an index.

    Tensors are read and held in memory for one file at a time: ``shard_bytes``, or one tensor that is larger.
    Raises UserError where a tensor is not finite; files before the one that it belongs to are written already.
    """
    plan: list[list[str]] = [[]]
    size = total = 0
    for name, stored in weights.items():
        bytes_ = stored.dtype.itemsize * torch.Size(stored.shape).numel()
        if plan[-1] and size + bytes_ > shard_bytes:
            plan.append([])
            size = 0
        plan[-1].append(name)
        size += bytes_
        total += bytes_
    files = [SAFETENSORS.single]
    if len(plan) > 1:
        files = [f"model-{number:05d}-of-{len(plan):05d}.safetensors" for number in range(1, len(plan) + 1)]
    for file, shard in zip(files, plan, strict=True):
        _write_shard({name: weights[name] for name in shard}, folder / file)
    if len(plan) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, shard in zip(files, plan, strict=True) for name in shard},
        }
        (folder / SAFETENSORS.index).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(weights: Weights, file: Path) -> None:
    """Write ``weights`` to ``file``, all held in memory. Raises UserError, and writes nothing, if one is not finite."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    buffers: set[int] = set()
    for name, stored in weights.items():
        tensor = stored.read().detach().to("cpu", stored.dtype).contiguous()
        assert tensor.shape == torch.Size(stored.shape), name
        # The library refuses tensors that share memory, as those of tied layers do in a pickle.
        buffer = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if buffer in buffers else tensor
        buffers.add(buffer)
    if broken := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise UserError(
            f"nothing is written: {number_of(len(broken), 'tensor is', 'tensors are')} not finite, {broken[0]} first."
        )
    save_file(tensors, file, metadata={"format": "pt"})


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _read(file: Path, name: str) -> torch.Tensor:
    """One tensor. The file is opened only for it: what stays mapped counts as the process's memory."""
    with _opened(file) as handle:
        tensor: torch.Tensor = handle.get_tensor(name)
        return tensor


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as problem:
        raise damaged(file, in_brief(problem)) from problem


def _refuse_twice(name: str, file: Path, weights: Weights) -> None:
    """Raise UserError if ``weights`` have the tensor ``name`` of ``file``, from another file of the same folder."""
    if name in weights:
        raise UserError(
            f"{file.parent}: several of its files have a tensor {name}, {file.name} among them, so it holds two sets of"
            " weights. Move one of them away."
        )


def _check_index(weights: Weights, folder: Path, names: FileNames) -> None:
    absent = [f"{name} ({file})" for name, file in index_of(folder, names).items() if name not in weights]
    if absent:
        raise UserError(f"{folder / names.index}: it lists tensors that are in no file: {', '.join(absent)}.")
