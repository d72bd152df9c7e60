"""What a model says of the tokens in a batch: log-probabilities, cross-entropy, hidden states. Imports torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the customary name

from panda.data.batches import TokenBatch
from panda.registry import UserError
from panda.registry.contexts import IGNORED_LABEL


def logits_of(model: Any, batch: TokenBatch) -> torch.Tensor:
    """[rows, length, entries], in the type of the model."""
    output = model(batch.input_ids, **batch.positions)
    logits: torch.Tensor = getattr(output, "logits", output)
    return logits


def label_log_probs(model: Any, batch: TokenBatch, *, temperature: float = 1.0) -> torch.Tensor:
    """[rows, length - 1], float32: of each label the log-probability after the tokens before it; 0 where is none.

    Element i is that of the label at i + 1. ``temperature`` divides the logits first.
    """
    return gathered_log_probs(logits_of(model, batch), batch, temperature=temperature)


def gathered_log_probs(logits: torch.Tensor, batch: TokenBatch, *, temperature: float = 1.0) -> torch.Tensor:
    """``label_log_probs`` from logits [rows, length, entries]."""
    following = batch.labels[:, 1:]
    labels = following.flatten()
    # Only these are turned into float32, and their number is known: the host does not wait for the device.
    where = (labels != IGNORED_LABEL).nonzero_static(size=batch.supervised_tokens).squeeze(1)
    chosen = logits[:, :-1].flatten(0, 1)[where].float()
    if temperature != 1.0:
        chosen = chosen / temperature
    found = -F.cross_entropy(chosen, labels[where], reduction="none")
    return found.new_zeros(labels.shape).index_copy(0, where, found).view(following.shape)


def sequence_log_probs(model: Any, batch: TokenBatch, *, temperature: float = 1.0) -> torch.Tensor:
    """[rows], float32: the log-probability of all labels of a row."""
    return label_log_probs(model, batch, temperature=temperature).sum(1)


def last_hidden(model: Any, batch: TokenBatch) -> torch.Tensor:
    """[rows, length, width]: the last hidden states, those that the output head is given, of a model of transformers.

    Raises UserError for another model.
    """
    try:
        # The head runs on one token a row, so that the model is run as a whole, which ZeRO-3 needs.
        output = model(batch.input_ids, **batch.positions, output_hidden_states=True, logits_to_keep=1)
        hidden: torch.Tensor = output.hidden_states[-1]
    except (TypeError, AttributeError) as problem:
        kind = type(getattr(model, "module", model)).__name__
        raise UserError(
            f"task: it needs the hidden states of the model, and {kind} does not give them as transformers' models do:"
            f" {problem}. Use a model of transformers."
        ) from problem
    return hidden


def next_token_loss(model: Any, batch: TokenBatch, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of the labels of ``batch``, with their weights, **summed**, in float32; a scalar.

    With ``label_smoothing`` a label has the rest of its probability on it, and that much spread over all entries. A
    model that computes the sum itself, without logits, says so with ``sums_loss`` (see panda.models).
    """
    varied: dict[str, Any] = {} if batch.weights is None else {"label_weights": batch.weights}
    varied |= {"label_smoothing": label_smoothing} if label_smoothing else {}
    if getattr(model, "sums_varied_loss" if varied else "sums_loss", False):
        counted = {"labels": batch.labels, "supervised_tokens": batch.supervised_tokens}
        summed: torch.Tensor = model(batch.input_ids, **batch.positions, **counted, **varied)
        return summed
    logits = logits_of(model, batch)[:, :-1].flatten(0, 1).float()
    labels = batch.labels[:, 1:].flatten()
    how: dict[str, Any] = {"ignore_index": IGNORED_LABEL, "label_smoothing": label_smoothing}
    if batch.weights is None:
        return F.cross_entropy(logits, labels, reduction="sum", **how)
    return (F.cross_entropy(logits, labels, reduction="none", **how) * batch.weights[:, 1:].flatten()).sum()
