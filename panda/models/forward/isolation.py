"""Checking that a model keeps the samples of a row apart, which packing relies on."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from panda.registry import UserError

INSTEAD = "Write `batching: grouped`, which works with any model, or use one whose attention follows `position_ids`."


def refuse_without_positions(model: torch.nn.Module, name: str) -> None:
    """Raise UserError where the forward of ``model`` does not take ``position_ids``."""
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise UserError(
            f"batching: packed: refused, since model {name!r} cannot keep the samples of a row apart: its forward does"
            f" not accept `position_ids`. {INSTEAD}"
        )


@torch.no_grad()
def refuse_leaking(module: Any, name: str, vocab_size: int, device: torch.device) -> None:
    """Raise UserError where a sample's logits depend on the sample before it in its row. Runs ``module`` twice.

    This is tried out because it cannot be looked up: an attention implementation may use ``position_ids`` only for
    the rotary embedding, or separate samples only in batches of one row.
    """
    tokens = torch.arange(16, device=device).view(2, 8) % vocab_size
    tokens[1, 4:] = tokens[0, 4:]  # two rows that differ only in their first sample
    apart = torch.arange(4, device=device).repeat(2, 2)
    together = torch.arange(8, device=device).repeat(2, 1)
    leaked, reference = (_difference(module(input_ids=tokens, position_ids=p)) for p in (apart, together))
    if not leaked <= 0.01 * reference:
        raise UserError(
            f"batching: packed: refused, since a sample of model {name!r} sees the one before it in its row (its logits"
            f" move by {leaked:.2g}; {reference:.2g} where they are one sample). {INSTEAD}"
        )


def _difference(output: Any) -> float:
    logits = getattr(output, "logits", output)
    return float((logits[0, 4:].float() - logits[1, 4:].float()).abs().max())
