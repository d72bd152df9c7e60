"""`deterministic`: what a GPU computes differently from start to start is computed in another way, or ends the run.

panda's own kernels for GPUs use no atomics and are not chosen by timing them. What it leaves to torch goes by torch's
switch: sums that many threads add to (``index_add_``, ``scatter_add_``), and the backward of FlashAttention, also of
packed rows, which torch computes alike only where the switch raises errors (2.13: not with ``warn_only``). `compile` is
refused (configuration/refusals.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from typing import cast

import torch

from panda.registry import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACE = ":4096:8"
"""Of cuBLAS: with a fixed workspace for each stream it adds up in one order. It reads this at the first product."""
_LACKING = "does not have a deterministic implementation"


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """With ``wanted``, operations give the same bits each time, inside. Raises UserError for one that cannot.

    What was switched is switched back at the end.
    """
    if not wanted:
        yield
        return
    cudnn, filling = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.benchmark,
        filling.fill_uninitialized_memory,
    )
    workspace = os.environ.get(WORKSPACE)
    os.environ.setdefault(WORKSPACE, _WORKSPACE)
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark = False
    # torch would fill each new tensor with NaN, for programs that read what they have not written. DeepSpeed's padding
    # would come into its norms, and each allocation would take longer.
    filling.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as problem:
        if _LACKING not in str(problem) and WORKSPACE not in str(problem):
            raise
        raise UserError(_what_lacks(str(problem))) from problem
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.benchmark, filling.fill_uninitialized_memory = before[2:]
        if workspace is None:
            os.environ.pop(WORKSPACE, None)


def how_alike() -> dict[str, Any]:
    """What makes operations give the same bits, for the record of a run."""
    found = {"algorithms": torch.are_deterministic_algorithms_enabled(), WORKSPACE: os.environ.get(WORKSPACE)}
    if not torch.cuda.is_available():
        return found
    libraries = cast(Any, torch.backends.cudnn), cast(Any, torch.cuda.nccl)
    cudnn, nccl = (library.version() for library in libraries)
    return {**found, "gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cudnn": cudnn, "nccl": nccl}


def _what_lacks(problem: str) -> str:
    if _LACKING in problem:
        name = problem.partition(_LACKING)[0].strip()
        return (
            f"deterministic: torch {torch.__version__} cannot compute {name} to the same bits each time on a GPU, and"
            " this run needs it. Leave `deterministic` out, or take a model or a task that does without."
        )
    return (
        f"deterministic: {WORKSPACE} is {os.environ.get(WORKSPACE)!r} in the environment, with which cuBLAS does not"
        f" give the same bits each time. Unset it, or set it to {_WORKSPACE}."
    )
