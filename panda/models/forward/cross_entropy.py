"""Cross-entropy of an output head, without its logits.

Logits are the largest tensor of a training step: 2,048 tokens over 32,000 entries are 262 MB in
float32, and again for their gradient. Here they exist for a few tokens at a time, and only for tokens
that carry loss. Each part's gradient is taken at once, while its logits are there, so nothing is
computed twice and backward needs no weight: under ZeRO-3 it may be partitioned again by then.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the customary name
from torch.autograd.function import once_differentiable

from panda.registry.contexts import IGNORED_LABEL

LOGITS_AT_ONCE = 2**26
"""Logits that exist at a time, at most (256 MiB in float32)."""


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Cross-entropy of ``labels`` [tokens] under logits ``hidden @ weight.T``, summed, in float32; a scalar.

    ``hidden`` is [tokens, width] and ``weight`` [vocabulary, width], of one dtype. Logits are of that
    dtype too, as the head would compute them; softmax and sums are in float32 (float64 for float64).
    The gradient is the true one: of ``weight`` it is summed in float32 and rounded once.

    With ``group``, ``weight`` is this rank's part of the vocabulary, each rank of the group has one of as
    many rows, in order, and all call this with the same ``hidden`` and ``labels``. Each gets the whole loss,
    the gradient of ``hidden``, and that of its own part of the weight.
    """
    loss: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, torch.is_grad_enabled(), group)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        is_training: bool,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        loss = hidden.new_zeros((), dtype=exact)
        hidden_grad = torch.empty_like(hidden) if is_training and ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight, dtype=exact) if is_training and ctx.needs_input_grad[1] else None
        rows = max(1, LOGITS_AT_ONCE // len(weight))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], weight).to(exact)
            label = labels[part].unsqueeze(1)
            one = logits.new_ones(label.shape)
            if group:
                label = label - len(weight) * dist.get_rank(group)
                one = ((label >= 0) & (label < len(weight))).to(
                    exact
                )  # where the label is of this part, and 0 elsewhere
                label = label.clamp(0, len(weight) - 1)
            normaliser = logits.logsumexp(1, keepdim=True)
            labelled = logits.gather(1, label)
            if group:
                normaliser, labelled = _over_vocabulary(normaliser, labelled.masked_fill(one == 0, 0), group)
            loss += (normaliser - labelled).sum()
            if hidden_grad is None and weight_grad is None:
                continue
            # Softmax minus one at the label, in the place of the logits.
            grad = logits.sub_(normaliser).exp_()
            grad.scatter_add_(1, label, -one)
            rounded = grad.to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(rounded, weight, out=hidden_grad[part])
            if weight_grad is not None:
                weight_grad += rounded.t() @ hidden[part]
        if group and hidden_grad is not None:
            dist.all_reduce(hidden_grad, group=group)
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        if weight_grad is not None:
            weight_grad = torch.mul(weight_grad, loss_grad, out=torch.empty_like(weight_grad, dtype=ctx.dtype))
        return None if hidden_grad is None else hidden_grad * loss_grad, weight_grad, None, None, None


def _over_vocabulary(
    normaliser: torch.Tensor, labelled: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normaliser and the label's logit over all parts of the vocabulary, from those of this rank's part."""
    largest = normaliser.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    sums = torch.cat([(normaliser - largest).exp(), labelled], dim=1)
    dist.all_reduce(sums, group=group)
    return largest + sums[:, :1].log(), sums[:, 1:]


def offer_loss_sum(model: Any) -> None:
    """Have ``model``, a causal language model of transformers, compute its loss without logits.

    Its forward then returns, where it is given ``labels`` [rows, length] (the token at the same
    place, or IGNORED_LABEL), their cross-entropy under the token before, summed: a scalar. The number
    of labels that count may be given as ``supervised_tokens``, and spares waiting for the device to
    count them. ``model.sums_loss`` says that it does. Without labels its forward is what it was.

    Right for a model whose logits are its output embedding's, with nothing behind it (no soft cap, no
    factor). Where the head is no plain linear layer (an adapter is on it) logits are made after all.
    """
    plain_forward = model.forward

    def forward(
        self: Any,
        input_ids: torch.Tensor,
        *arguments: Any,
        labels: torch.Tensor | None = None,
        supervised_tokens: int | None = None,
        **keywords: Any,
    ) -> Any:
        if labels is None:
            return plain_forward(input_ids, *arguments, **keywords)
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()
        counts = following != IGNORED_LABEL
        if supervised_tokens is None:
            where = counts.nonzero().squeeze(1)
        else:
            where = counts.nonzero_static(size=supervised_tokens).squeeze(1)
        head = self.get_output_embeddings()
        group = getattr(head, "vocabulary_group", None)  # of tensor-parallel ranks, a part of the rows on each
        if (type(head) is not torch.nn.Linear and group is None) or head.bias is not None:
            logits = plain_forward(input_ids, *arguments, **keywords).logits.flatten(0, 1)
            return F.cross_entropy(logits[where].float(), following[where], reduction="sum")
        hidden = self.base_model(input_ids, *arguments, **keywords).last_hidden_state.flatten(0, 1)
        # Taken from the head within this forward, which is where ZeRO-3 gathers it.
        return linear_cross_entropy(hidden[where], head.weight, following[where], group)

    model.forward = MethodType(forward, model)
    model.sums_loss = True
