"""Whether rows hold several samples, told to transformers instead of asked of the device.

Where there is no cache, transformers looks at the positions that a model is given and asks the device
whether they are of one sample a row: in every forward the host waits for all work that is queued.
panda knows: rows are packed where ``position_ids`` are given, and each sample begins at 0.
"""

from __future__ import annotations

from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from transformers import masking_utils

_packed: ContextVar[bool | None] = ContextVar("packed", default=None)
"""Within the forward of a model that ``tell_packing`` was called with: whether its rows are."""
_ask = masking_utils.find_packed_sequence_indices


def tell_packing(model: Any) -> None:
    """Have ``model``, of transformers, take ``position_ids`` to mean that rows hold several samples, without a look."""
    # A name that transformers looks up at each call. Should it look up another one day, it asks again.
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
    """[rows, length], a number a sample of the row; None where each row is one sample."""
    packed = _packed.get()
    if packed is None:
        asked: torch.Tensor | None = _ask(position_ids)
        return asked
    return (position_ids == 0).cumsum(-1) if packed else None
