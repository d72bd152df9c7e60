"""Reads the weights of a checkpoint of any ZeRO stage, without a process group and without the model."""

from __future__ import annotations

import contextlib
import io
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from panda.engine.checkpoints.folders import check_contents
from panda.engine.checkpoints.reading import load_plain
from panda.engine.checkpoints.reading import plain_only
from panda.registry import UserError
from panda.registry.errors import in_brief
from panda.weights.stored_tensor import StoredTensor
from panda.weights.stored_tensor import Weights

SPLIT_DIMENSIONS = "panda_split_dimensions"
"""Key in DeepSpeed's files: by name, the dimension along which tensor-parallel ranks split a parameter."""

_WHOLE = "mp_rank_*_model_states.pt"
_PARTITIONED = "zero_pp_rank_0_mp_rank_00_model_states.pt"


def checkpoint_weights(checkpoint: Path) -> Weights:
    """The module's tensors in ``checkpoint``, each under its first name, in the type of the forward pass.

    Files are memory-mapped, and a partitioned tensor is joined when it is read: under ZeRO-3 from the fp32
    master weights of all ranks, rounded as DeepSpeed rounds them; under tensor parallelism from the ranks'
    shards. Raises UserError if a file has another content than was written.
    """
    is_partitioned = (checkpoint / _PARTITIONED).exists()
    files = [checkpoint / _PARTITIONED] if is_partitioned else sorted(checkpoint.glob(_WHOLE))
    check_contents(checkpoint, sorted(checkpoint.glob("*.pt")) if is_partitioned else files)
    states = [load_plain(file) for file in files]
    for file, state in zip(files, states, strict=True):
        if not isinstance(state, dict) or not isinstance(state.get("module"), dict):
            raise UserError(f"{file}: it holds no state of a module. Name an older checkpoint.")
    module: dict[str, torch.Tensor] = states[0]["module"]
    if is_partitioned:
        parts = {name: [tensor] for name, tensor in _master_weights(checkpoint).items()}
        repeated = states[0]["shared_params"]
    else:
        parts = {name: [state["module"][name] for state in states] for name in module}
        repeated = _names_after_the_first(module)
    split: dict[str, int] = states[0].get(SPLIT_DIMENSIONS, {})
    return {
        name: _stored(parts[name] if name in split else parts[name][:1], split.get(name, 0), tensor.dtype)
        for name, tensor in module.items()
        if name not in repeated
    }


def split_dimensions_in(checkpoint: Path) -> dict[str, int]:
    """By name, the dimension along which tensor-parallel ranks split a parameter of ``checkpoint``."""
    file = next(iter(sorted(checkpoint.glob("*mp_rank_00_model_states.pt"))))
    found: dict[str, int] = load_plain(file).get(SPLIT_DIMENSIONS, {})
    return found


def _names_after_the_first(module: dict[str, torch.Tensor]) -> set[str]:
    """Names of tensors that have an earlier name. DeepSpeed 0.19.8 writes which those are only under ZeRO."""
    first: dict[int, str] = {}
    return {name for name, tensor in module.items() if first.setdefault(tensor.data_ptr(), name) != name}


def _master_weights(checkpoint: Path) -> dict[str, Any]:
    """fp32 tensors by name, most of them placeholders of DeepSpeed that join the ranks' parts on request."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed 0.19.8 warns otherwise
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # In DeepSpeed 0.19.8 it prints, and draws progress bars. Can go when it logs.
    try:
        with plain_only(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
                str(checkpoint.parent), checkpoint.name, lazy_mode=True
            )
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as problem:
        raise UserError(
            f"{checkpoint}: its files are damaged, or not of a checkpoint: {in_brief(problem)}. Name an older one."
        ) from problem
    return found


def _stored(parts: list[Any], dimension: int, dtype: torch.dtype) -> StoredTensor:
    shape = list(parts[0].shape)
    if len(parts) > 1:
        shape[dimension] *= len(parts)
    return StoredTensor(tuple(shape), dtype, partial(_read, parts, dimension, dtype))


def _read(parts: list[Any], dimension: int, dtype: torch.dtype) -> torch.Tensor:
    whole: torch.Tensor = torch.cat(parts, dimension) if len(parts) > 1 else parts[0].contiguous()
    return whole.to(dtype)
