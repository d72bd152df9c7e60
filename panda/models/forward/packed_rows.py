"""Telling transformers whether rows hold several samples, so that it does not ask the device.

Without a cache, transformers (5.23, 2026-11) compares the positions that a model is given on the device, to
find out whether a row holds one sample: in every forward the host waits for all queued work. panda
knows the answer: rows are packed if ``position_ids`` are given, and each sample starts at 0. This can go
when transformers accepts the answer as an argument.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from functools import wraps
from types import MethodType
from typing import Any
from typing import Literal

import torch
from transformers import masking_utils

rows_now: ContextVar[Literal["single", "packed", "bounded"] | None] = ContextVar("rows_now", default=None)
"""During a forward of a model that ``tell_packing`` was called with: whether a row is one sample, or several that
``position_ids`` tell apart, or several whose bounds its attention is given (see varlen_attention.py)."""
_ask = masking_utils.find_packed_sequence_indices


def tell_packing(model: Any) -> None:
    """Make ``model``, of transformers, conclude from ``position_ids`` being given that rows are packed."""
    # transformers looks this name up at each call. If a later version uses another name, it asks the device again.
    masking_utils.find_packed_sequence_indices = _sample_of_each_token
    base = model.base_model
    plain_forward = base.forward

    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        bounded, packed = (keywords.get(name) is not None for name in ("sample_bounds", "position_ids"))
        token = rows_now.set("bounded" if bounded else "packed" if packed else "single")
        try:
            return plain_forward(*arguments, **keywords)
        finally:
            rows_now.reset(token)

    base.forward = MethodType(forward, base)
    model.is_told_packing = True


def takes_positions(model: torch.nn.Module) -> bool:
    """Whether the forward of ``model`` takes ``position_ids``."""
    parameters = inspect.signature(model.forward).parameters
    return "position_ids" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def leave_out(model: Any, *names: str) -> None:
    """Make the forward of ``model`` ignore the arguments ``names``, which batches carry for another model."""
    plain_forward = model.forward

    @wraps(plain_forward)
    def forward(*arguments: Any, **keywords: Any) -> Any:
        return plain_forward(*arguments, **{name: value for name, value in keywords.items() if name not in names})

    model.forward = forward


def is_told_packing(model: torch.nn.Module) -> bool:
    """Whether ``tell_packing`` was called with ``model``."""
    return bool(getattr(model, "is_told_packing", False))


def _sample_of_each_token(position_ids: torch.Tensor) -> torch.Tensor | None:
    """For each token, [rows, length], the number of its sample in the row; None where no mask has to separate them."""
    rows = rows_now.get()
    if rows is None:
        asked: torch.Tensor | None = _ask(position_ids)
        return asked
    return (position_ids == 0).cumsum(-1) if rows == "packed" else None
