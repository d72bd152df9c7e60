"""Checking that a model keeps the samples of a row apart, which packing relies on."""

from __future__ import annotations

from typing import Any

import torch

from panda.models.forward.packed_rows import takes_positions
from panda.models.forward.trial import largest
from panda.registry import UserError

INSTEAD = "Write `batching: grouped`, which works with any model, or use one whose attention follows `position_ids`."


def refuse_without_positions(model: torch.nn.Module, name: str) -> None:
    """Raise UserError where the forward of ``model`` does not take ``position_ids``."""
    if not takes_positions(model):
        raise UserError(
            f"batching: packed: refused, since model {name!r} cannot keep the samples of a row apart: its forward does"
            f" not accept `position_ids`. {INSTEAD}"
        )


@torch.no_grad()
def refuse_leaking(module: Any, name: str, vocab_size: int, device: torch.device, *, bounded: bool = False) -> None:
    """Raise UserError where a sample's logits depend on the sample before it in its row. Runs ``module`` three times.

    With ``bounded`` it is given the bounds of samples, too.

    This is tried out because it cannot be looked up: an attention implementation may use ``position_ids`` only for
    the rotary embedding, or separate samples only in batches of one row, and a convolution may not use them at all.
    """
    tokens = torch.arange(24, device=device).view(3, 8) % vocab_size
    tokens[1, 4:] = tokens[0, 4:]  # two rows that differ only in their first sample
    separate, whole, beside_another = (
        _logits(module(input_ids=tokens[pair], **_positions(samples, device, bounded)))
        for pair, samples in (([0, 1], 2), ([0, 1], 1), ([0, 2], 2))
    )
    leaked, reference = largest(separate[0, 4:] - separate[1, 4:]), largest(whole[0, 4:] - whole[1, 4:])
    # What a row is computed with may change its rounding: in a mixture of experts, how many tokens an expert has.
    rounding = largest(separate[0] - beside_another[0])
    # Without a leak most models give the same bits. That of a short convolution can be small, and gradients see it.
    if not leaked <= max(1e-5 * reference, 10 * rounding):
        raise UserError(
            f"batching: packed: refused, since a sample of model {name!r} sees the one before it in its row (its logits"
            f" move by {leaked:.2g}; {reference:.2g} where they are one sample). {INSTEAD}"
        )


def _positions(samples: int, device: torch.device, bounded: bool) -> dict[str, Any]:
    """What a model is given besides two rows of 8 tokens, each of which is so many samples of the same length."""
    length = 8 // samples
    positions = {"position_ids": torch.arange(length, device=device).repeat(2, samples)}
    if not bounded:
        return positions
    bounds = torch.arange(0, 17, length, dtype=torch.int32, device=device)
    return positions | {"sample_bounds": bounds, "longest_sample": length}


def _logits(output: Any) -> torch.Tensor:
    logits: torch.Tensor = getattr(output, "logits", output)
    return logits.float()
