"""How many positions a model has, where it has learnt, or holds, each of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

_NAMED_SO = re.compile(r"(^|_)(wpe|pe|pos|position|positions)(_|$)")


def held_positions(model: torch.nn.Module) -> int | None:
    """The most tokens that ``model`` can take, as GPT-2's 1,024; None where it computes positions, as RoPE does.

    They are found by the names of tables in it: at a token beyond a table it would raise an IndexError.
    """
    found = list(_tables(model))
    if not found:
        return None
    config: Any = getattr(model, "config", None)
    stated = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions")]
    # A table can have rows besides those of positions (OPT's first two).
    return min([*found, *(positions for positions in stated if isinstance(positions, int) and positions > 0)])


def _tables(model: torch.nn.Module) -> Iterator[int]:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and _is_of_positions(name):
            # RoBERTa's positions begin after the row of padding.
            yield module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        shape = getattr(tensor, "ds_shape", tensor.shape)  # of the whole, where ZeRO-3 keeps a part
        while len(shape) > 2 and shape[0] == 1:
            shape = shape[1:]
        if tensor.is_floating_point() and len(shape) == 2 and _is_of_positions(name):
            yield shape[0]


def _is_of_positions(name: str) -> bool:
    last = name.rpartition(".")[2]
    return bool(_NAMED_SO.search(last)) and "rel" not in last
