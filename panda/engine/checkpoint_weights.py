"""The weights in a checkpoint, of any ZeRO stage, without a process group and without the model."""

from __future__ import annotations

import contextlib
import io
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from panda.stored_tensor import StoredTensor
from panda.stored_tensor import Weights

_WHOLE = "mp_rank_00_model_states.pt"
_PARTITIONED = "zero_pp_rank_0_mp_rank_00_model_states.pt"


def checkpoint_weights(checkpoint: Path) -> Weights:
    """The module's tensors in ``checkpoint``, each under its first name, in the type that it is computed with.

    Files are mapped, and a tensor that is partitioned is joined when it is read: under ZeRO-3 from
    the fp32 master weights of all ranks, and rounded as DeepSpeed rounds them to compute. Loads
    pickles: trust the path.
    """
    is_partitioned = (checkpoint / _PARTITIONED).exists()
    file = checkpoint / (_PARTITIONED if is_partitioned else _WHOLE)
    state: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    module: dict[str, torch.Tensor] = state["module"]
    values: dict[str, Any] = _master_weights(checkpoint) if is_partitioned else module
    repeated = state["shared_params"] if is_partitioned else _names_after_the_first(module)
    return {
        name: StoredTensor(tuple(values[name].shape), tensor.dtype, partial(_read, values[name], tensor.dtype))
        for name, tensor in module.items()
        if name not in repeated
    }


def _names_after_the_first(module: dict[str, torch.Tensor]) -> set[str]:
    """Names of tensors that have one already; DeepSpeed writes which those are under ZeRO alone."""
    first: dict[int, str] = {}
    return {name for name, tensor in module.items() if first.setdefault(tensor.data_ptr(), name) != name}


def _master_weights(checkpoint: Path) -> dict[str, Any]:
    """fp32 tensors by name, most of them DeepSpeed's stand-ins that join the ranks' parts when asked."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # so that DeepSpeed does not go looking, and warn
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # It prints, and draws bars.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.parent), checkpoint.name, lazy_mode=True
        )
    return found


def _read(tensor: Any, dtype: torch.dtype) -> torch.Tensor:
    whole: torch.Tensor = tensor.contiguous().to(dtype)
    return whole
