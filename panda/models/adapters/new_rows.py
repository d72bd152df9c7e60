"""Rows of an embedding and a head for new tokens, which peft trains beside adapters; the other rows stay frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def new_rows(model: Any) -> dict[str, list[int]] | None:
    """The new rows of ``model``, by the name of the layer that has them, as peft is given them; None for none.

    Where embedding and head are one tensor, peft trains its rows once, under the name of the embedding.
    """
    rows: range = getattr(model, "new_rows", range(0))
    if not rows:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    return {name: list(rows) for name, module in model.named_modules() if any(module is layer for layer in layers)}


@contextmanager
def rows_of_partitioned_weights() -> Iterator[None]:
    """Lets peft copy rows of weights that ZeRO-3 has partitioned, on any device.

    As of 0.21 (2026-11), peft asks for the current GPU, and fails where there is none. Can go when it takes the device
    of the weight.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.integrations import gather_params_ctx

    def rows_of(layer: Any, weight: torch.Tensor, rows: Any, width: int) -> torch.Tensor:
        with gather_params_ctx([weight], modifier_rank=None):  # type: ignore[list-item]
            return weight[rows].detach().clone()

    theirs = TrainableTokensLayer._collect_token_weights
    TrainableTokensLayer._collect_token_weights = rows_of  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        TrainableTokensLayer._collect_token_weights = theirs  # type: ignore[method-assign]
