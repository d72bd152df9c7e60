"""Reads the files of a checkpoint that are pickles. Nothing in them is called but what is listed here.

``torch.load`` with ``weights_only`` makes tensors and plain containers, and the classes below, which DeepSpeed 0.19.8
writes beside them. DeepSpeed's own loading runs any code that a file names: who can send a checkpoint could then do
whatever its reader may. A checksum does not help against that, since it comes from the same sender.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from panda.registry import UserError
from panda.registry.errors import in_brief

_FORCED, _UNFORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def load_plain(file: Path) -> Any:
    """The content of ``file``, its tensors mapped into memory where its format allows that.

    Raises UserError where something else is in it than what panda and DeepSpeed write.
    """
    with _allowed():
        try:
            try:
                return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError:  # the older format of torch.save, which cannot be mapped
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as problem:
            raise refused(file, problem) from problem
        except (RuntimeError, EOFError, ValueError, KeyError, TypeError) as problem:  # of torch's parsers
            raise UserError(
                f"{file}: damaged, or not of a checkpoint: {in_brief(problem).partition('. ')[0]}. Name an older one."
            ) from problem


@contextmanager
def plain_only() -> Iterator[None]:
    """Inside it, DeepSpeed's functions load as ``load_plain`` does, also where they ask torch for more.

    Raises UserError where a file has something else in it.
    """
    before = {name: os.environ.get(name) for name in (_FORCED, _UNFORCED)}
    os.environ[_FORCED] = "1"  # torch reads it at each call
    os.environ.pop(_UNFORCED, None)
    try:
        with _allowed():
            yield
    except pickle.UnpicklingError as problem:
        raise refused(_read_by_torch(problem), problem) from problem
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _read_by_torch(problem: Exception) -> Any:
    """The file that ``torch.load`` was given when it raised ``problem``, which does not name it."""
    frames = (frame for frame, _ in walk_tb(problem.__traceback__) if frame.f_code is torch.load.__code__)
    return next((frame.f_locals["f"] for frame in frames), "a file of the checkpoint")


def refused(file: Path, problem: Exception) -> UserError:
    """The error for a ``file`` that has more in it than data. torch's own message advises to load it all the same."""
    names = str(problem).partition("GLOBAL ")[2].partition(" ")[0]
    what = f"it names {names}" if names else "it is no pickle of tensors"
    return UserError(
        f"{file}: {what}, which neither panda nor DeepSpeed writes into a checkpoint:"
        " loading it could run code. It is not loaded. Was it changed? If an optimizer of your own keeps such objects"
        " in its state, let it keep tensors and numbers."
    )


def refuse_unreadable(state: Any, whose: str) -> None:
    """Raise UserError where ``state``, of an optimizer of ``whose``, could be written into a checkpoint and not read.

    Its tensors are left out: only what is around them can be wrong.
    """
    written = io.BytesIO()
    try:
        torch.save(tree_map(lambda value: None if torch.is_tensor(value) else value, state), written)
        written.seek(0)
        with _allowed():
            torch.load(written, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as problem:
        what = str(problem).partition("GLOBAL ")[2].partition(" ")[0] or in_brief(problem)
        raise UserError(
            f"optimizer: its state holds more than tensors, numbers and texts ({what}), which no checkpoint gives back."
            f" This is a fault of {whose}."
        ) from problem


@contextmanager
def _allowed() -> Iterator[None]:
    allowed: list[Any] = []
    # Whoever reads the file of an optimizer has imported DeepSpeed. The others need not, for seconds of imports.
    if "deepspeed" in sys.modules:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        allowed += [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    with torch.serialization.safe_globals(allowed):
        yield


def load_old_random_state(file: Path) -> dict[str, Any]:
    """The random state in ``file``, as panda wrote it until 2026-11: a pickle with an array of numpy's in it."""
    # What an array of numpy is made of in a pickle; numpy 1 and 2 have the first under different names.
    holder: Any = np._core if hasattr(np, "_core") else np.core
    names: list[Any] = [np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    names += [
        (holder.multiarray._reconstruct, f"{name}.multiarray._reconstruct") for name in ("numpy._core", "numpy.core")
    ]
    with torch.serialization.safe_globals(names):
        found: dict[str, Any] = load_plain(file)
    return found
