"""Embeddings without a padding row: padding carries no loss and is not attended to, so no row has to be frozen."""

from __future__ import annotations

from typing import Any

import torch


def free_padding_row(model: Any) -> None:
    """Let the row of the padding token in the embedding of ``model`` learn like any other.

    transformers builds embeddings with ``padding_idx``, and torch then gives that row no gradient. Where the padding
    token is also the end token, as in many tokenizers, the end token would never learn.
    """
    embeddings = [model.get_input_embeddings()] if hasattr(model, "get_input_embeddings") else model.modules()
    for embedding in embeddings:  # positions may be computed from the padding_idx of others
        if isinstance(embedding, torch.nn.Embedding):
            embedding.padding_idx = None
