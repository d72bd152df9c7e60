"""A trial of a model before it is trained: it must not look ahead, and its output must have the right shape."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from panda.registry import UserError

_CAUSAL = (
    "Use a causal language model; an encoder such as BERT is not one (in some config.json, `is_decoder: true` makes it"
    " one)."
)
LENGTH = 16
"""Tokens of a row; those in its second half differ between the rows that are compared."""


@torch.no_grad()
def refuse_unfit(module: Any, name: str, vocab_size: int, device: torch.device) -> None:
    """Raise UserError where ``module`` cannot be trained on the next token. Runs it twice, on two short rows.

    Its logits must be [rows, length, entries] with an entry for each of the ``vocab_size`` of the tokenizer, finite,
    and those of a token must not depend on later tokens: a model that sees what it is to predict trains to a loss that
    means nothing. This is tried out because it cannot be looked up. ``name`` is that of the model.
    """
    rows = torch.arange(3 * LENGTH, device=device).view(3, LENGTH) * 7 % vocab_size
    rows[1, : LENGTH // 2] = rows[0, : LENGTH // 2]  # the first two rows differ only in their second half
    together, beside_another = (_logits(module(rows[pair]), name, vocab_size) for pair in ([0, 1], [0, 2]))
    half = slice(LENGTH // 2)
    moved = largest(together[0, half] - together[1, half])
    reference = largest(together[0] - together[1])
    # What a row is computed with may change its rounding: in a mixture of experts, how many tokens an expert has.
    rounding = largest(together[0, half] - beside_another[0, half])
    if moved > max(1e-4 * reference, 10 * rounding):
        raise UserError(
            f"model {name}: refused, since it looks ahead: its prediction of a token depends on that token and those"
            f" after it (logits move by {moved:.2g}; {reference:.2g} where the tokens themselves differ), so its loss"
            f" would mean nothing. {_CAUSAL}"
        )


def refuse_encoder(outline: Any, name: str) -> None:
    """Raise UserError where transformers says of ``outline``, which may be without weights, that it is an encoder.

    It finds early what ``refuse_unfit`` would find after the weights are loaded, and only for some classes: those that
    warn, when made without `is_decoder`, that they predict the next token only with it (transformers 5.23, 2026-11).
    """
    from transformers import PreTrainedModel

    if not isinstance(outline, PreTrainedModel) or getattr(outline.config, "is_decoder", None) is not False:
        return
    kind: Any = type(outline)
    if kind.__module__.startswith("transformers.") and "standalone, add `is_decoder=True" in inspect.getsource(kind):
        raise UserError(
            f"model {name}: refused, since it looks ahead: {kind.__name__} is causal only where its config.json says"
            f" `is_decoder: true`, so its loss would mean nothing. {_CAUSAL}"
        )


def _logits(output: Any, name: str, vocab_size: int) -> torch.Tensor:
    logits = getattr(output, "logits", output)
    shape = list(getattr(logits, "shape", ()))
    if len(shape) != 3 or shape[:2] != [2, LENGTH] or shape[2] < vocab_size:
        found = f"of shape {shape}" if shape else f"a {type(logits).__name__}"
        raise UserError(
            f"model {name}: for {[2, LENGTH]} tokens its output is {found}; expected logits [2, {LENGTH}, entries] with"
            f" at least {vocab_size:,} entries, those of the tokenizer. Use a causal language model, and its tokenizer."
        )
    if not bool(logits.isfinite().all()):
        raise UserError(
            f"model {name}: its logits are not finite in a trial of {LENGTH} tokens. Are the weights damaged, or does"
            f" it overflow in {str(logits.dtype).removeprefix('torch.')}? Write `precision: bf16` or `fp32`."
        )
    return logits.float()  # type: ignore[no-any-return]


def largest(difference: torch.Tensor) -> float:
    """The largest of the absolute values."""
    return float(difference.abs().max())
