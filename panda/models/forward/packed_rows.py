"""Telling transformers whether rows hold several samples, so that it does not ask the device.

Without a cache, transformers (5.23, 2026-11) compares the positions that a model is given on the device, to
find out whether a row holds one sample: in every forward the host waits for all queued work. panda
knows the answer: rows are packed if ``position_ids`` are given, and each sample starts at 0. This can go
when transformers accepts the answer as an argument.
"""

from __future__ import annotations

from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from transformers import masking_utils

_packed: ContextVar[bool | None] = ContextVar("packed", default=None)
"""During a forward of a model that ``tell_packing`` was called with: whether its rows are packed."""
_ask = masking_utils.find_packed_sequence_indices


def tell_packing(model: Any) -> None:
    """Make ``model``, of transformers, conclude from ``position_ids`` being given that rows are packed."""
    # transformers looks this name up at each call. If a later version uses another name, it asks the device again.
    masking_utils.find_packed_sequence_indices = _sample_of_each_token
    base = model.base_model
    plain_forward = base.forward

    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        token = _packed.set(keywords.get("position_ids") is not None)
        try:
            return plain_forward(*arguments, **keywords)
        finally:
            _packed.reset(token)

    base.forward = MethodType(forward, base)


def _sample_of_each_token(position_ids: torch.Tensor) -> torch.Tensor | None:
    """For each token, [rows, length], the number of its sample in the row; None where each row is one sample."""
    packed = _packed.get()
    if packed is None:
        asked: torch.Tensor | None = _ask(position_ids)
        return asked
    return (position_ids == 0).cumsum(-1) if packed else None
