"""Weights in files: read tensor by tensor, so that a process holds one, and written shard by shard."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from panda.registry import UserError
from panda.registry.errors import in_brief
from panda.weights.shards import PICKLES
from panda.weights.shards import SAFETENSORS
from panda.weights.shards import Kind
from panda.weights.shards import damaged
from panda.weights.shards import index_of
from panda.weights.shards import shards
from panda.weights.stored_tensor import StoredTensor
from panda.weights.stored_tensor import Weights

SHARD_BYTES = 5 * 10**9

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
"""Names of types in the headers of safetensors."""


def safetensors_weights(folder: Path) -> Weights:
    """The tensors of the safetensors files in ``folder``; reads their headers alone.

    Raises UserError for a file that is missing or damaged.
    """
    weights: dict[str, StoredTensor] = {}
    for file in shards(folder, SAFETENSORS):
        with _opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                part = handle.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise UserError(
                        f"{file}: {name} is of type {part.get_dtype()}, which panda does not read. Give the checkpoint"
                        f" in one of {', '.join(_DTYPES)}."
                    )
                weights[name] = StoredTensor(tuple(part.get_shape()), dtype, partial(_read, file, name))
    _check_index(weights, folder, SAFETENSORS)
    return weights


def pickled_weights(folder: Path) -> Weights:
    """The tensors of the pickles in ``folder``, mapped and not read. No code of theirs runs: ``weights_only``."""
    weights: dict[str, StoredTensor] = {}
    for file in shards(folder, PICKLES):
        for name, tensor in load_pickle(file).items():
            weights[name] = StoredTensor(tuple(tensor.shape), tensor.dtype, partial(_itself, tensor))
    _check_index(weights, folder, PICKLES)
    return weights


def load_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The state dict in ``file``, mapped into memory where its format allows that."""
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file of torch before 1.6 cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:  # torch's own words are how to load it nonetheless
        raise damaged(file, "torch's `weights_only` refuses it", "a pickle of tensors alone") from problem
    except Exception as problem:  # torch raises what its parsers raise
        raise damaged(file, in_brief(problem).partition(". ")[0], "a pickle") from problem
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file}: expected a dictionary of tensors by name.")
    return state


def write_weights(weights: Weights, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``weights`` to ``folder`` as transformers does, one file or several and an index; holds one at a time."""
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, stored in weights.items():
        bytes_ = stored.dtype.itemsize * torch.Size(stored.shape).numel()
        if shards[-1] and size + bytes_ > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
        total += bytes_
    names = [SAFETENSORS.single]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        broken = _write_safetensors({key: weights[key] for key in shard}, folder / name)
        if broken:
            (folder / name).unlink()
            raise UserError(f"nothing is written: {len(broken)} tensors are not finite, {broken[0]} first.")
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        (folder / SAFETENSORS.index).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_safetensors(weights: Weights, file: Path) -> list[str]:
    """Write ``weights`` to ``file``, in safetensors' format; holds one at a time. The names of those not finite.

    The library's own function wants all of them at once, and copies them.
    """
    order = sorted(weights, key=lambda name: -weights[name].dtype.itemsize)  # the library's, which keeps all aligned
    types = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        stored, begin = weights[name], end
        end += stored.dtype.itemsize * torch.Size(stored.shape).numel()
        header[name] = {"dtype": types[stored.dtype], "shape": list(stored.shape), "data_offsets": [begin, end]}
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    written += b" " * (-len(written) % 8)
    broken = []
    with file.open("wb") as stream:
        stream.write(len(written).to_bytes(8, "little") + written)
        for name in order:
            stored = weights[name]
            tensor = stored.read().detach().to("cpu", stored.dtype).contiguous()
            assert tensor.shape == torch.Size(stored.shape), name
            if not bool(torch.isfinite(tensor).all()):
                broken.append(name)
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return broken


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _read(file: Path, name: str) -> torch.Tensor:
    """One tensor. The file is opened for it alone: what stays mapped counts as the process's memory."""
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


def _check_index(weights: Weights, folder: Path, kind: Kind) -> None:
    absent = [f"{name} ({file})" for name, file in index_of(folder, kind).items() if name not in weights]
    if absent:
        raise UserError(f"{folder / kind.index}: tensors that it lists are in no file: {', '.join(absent)}.")
