"""Cross-entropy of an output head, without its logits.

Logits are the largest tensor of a training step: for 2,048 tokens and 32,000 entries they take 262 MB in
float32, and their gradient as much again. Here they exist for a few tokens at a time, and only for tokens
that carry loss. The gradient of each part is computed while its logits exist, so nothing is computed
twice, and backward does not need the weight, which ZeRO-3 may have partitioned again by then.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the customary name
from torch.autograd.function import once_differentiable

from panda.files.compilers import can_compile
from panda.registry.contexts import IGNORED_LABEL

LOGITS_AT_ONCE = 2**26
"""The most logits that exist at a time (256 MiB in float32, and the exponentials as much)."""
BY_KERNELS_AT_ONCE = 2**28
"""The same on a GPU in 16 bits, where they are all that exists (512 MiB)."""


@dataclass(frozen=True)
class Variation:
    """How the cross-entropy of a label differs from the plain one."""

    smoothing: float = 0.0
    """Share of its probability that is spread over all entries, as in ``torch.nn.functional.cross_entropy``."""
    weights: torch.Tensor | None = None
    """float32 [tokens]: what that of each label is multiplied by."""
    group: dist.ProcessGroup | None = None
    """The ranks that have the rows of the vocabulary between them."""


PLAIN = Variation()


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    variation: Variation = PLAIN,
) -> torch.Tensor:
    """Cross-entropy of ``labels`` [tokens] under logits ``hidden @ weight.T``, summed, in float32; a scalar.

    ``hidden`` is [tokens, width] and ``weight`` [vocabulary, width], of one dtype. Logits are of that
    dtype too, as the head would compute them; softmax and sums are in float32 (float64 for float64).
    The gradient is exact: that of ``weight`` is summed in float32 and rounded once.

    With ``group``, ``weight`` is this rank's part of the vocabulary. The parts have equally many rows, in the order
    of the ranks, and all ranks of the group call this with the same ``hidden`` and ``labels``. Each gets the whole
    loss, the gradient of ``hidden``, and that of its own part of the weight.
    """
    given = replace(variation, group=group)
    loss: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, torch.is_grad_enabled(), given)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        is_training: bool,
        variation: Variation,
    ) -> torch.Tensor:
        group = variation.group
        exact = torch.promote_types(hidden.dtype, torch.float32)
        loss = hidden.new_zeros((), dtype=exact)
        hidden_grad = torch.empty_like(hidden) if is_training and ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight, dtype=exact) if is_training and ctx.needs_input_grad[1] else None
        by_kernels = hidden.is_cuda and hidden.dtype.itemsize == 2 and can_compile(hidden.device)
        rows = max(1, (BY_KERNELS_AT_ONCE if by_kernels else LOGITS_AT_ONCE) // len(weight))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], weight)
            label = labels[part].unsqueeze(1)
            one = logits.new_ones(label.shape, dtype=exact)
            if group:
                label = label - len(weight) * dist.get_rank(group)
                one = ((label >= 0) & (label < len(weight))).to(exact)  # where it is of this part, and 0 elsewhere
                label = label.clamp(0, len(weight) - 1)
            normaliser, labelled = _normaliser(logits, by_kernels), logits.gather(1, label).to(exact)
            if group:
                normaliser, labelled = _over_vocabulary(normaliser, labelled.masked_fill(one == 0, 0), group)
            losses = normaliser - labelled
            weights = None if variation.weights is None else variation.weights[part].unsqueeze(1).to(exact)
            entries, smoothing = len(weight) * (dist.get_world_size(group) if group else 1), variation.smoothing
            if smoothing:
                total = logits.sum(1, keepdim=True, dtype=exact)
                if group:
                    dist.all_reduce(total, group=group)
                losses = normaliser - (1 - smoothing) * labelled - smoothing * total / entries
            loss += (losses if weights is None else losses * weights).sum()
            if hidden_grad is None and weight_grad is None:
                continue
            at_label = (1 - smoothing) * one if smoothing else one
            gradient = _by_kernels if by_kernels else _by_torch
            rounded = gradient(logits, normaliser, label, at_label, weights, smoothing / entries)
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


def _normaliser(logits: torch.Tensor, by_kernels: bool) -> torch.Tensor:
    """[rows, 1]: the logarithm of the sum of the exponentials of each row of ``logits``, in float32 or float64."""
    if by_kernels:
        from panda.models.forward.softmax_triton import normaliser

        return normaliser(logits)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(1, keepdim=True)


def _by_kernels(logits: torch.Tensor, *given: Any) -> torch.Tensor:
    """The same as ``_by_torch``, on a GPU in 16 bits."""
    from panda.models.forward.softmax_triton import gradient_in_place

    return gradient_in_place(logits, *given)


def _by_torch(
    logits: torch.Tensor,
    normaliser: torch.Tensor,
    label: torch.Tensor,
    at_label: torch.Tensor,
    weights: torch.Tensor | None,
    spread: float,
) -> torch.Tensor:
    """The gradient of the losses by their ``logits`` [rows, entries], in the type of these, which are lost.

    That is softmax minus ``spread``, minus ``at_label`` at the ``label``, times ``weights``; each of them [rows, 1].
    """
    gradient = logits.to(normaliser.dtype).sub_(normaliser).exp_()
    if spread:
        gradient.sub_(spread)
    gradient.scatter_add_(1, label, -at_label)
    if weights is not None:
        gradient.mul_(weights)
    return gradient.to(logits.dtype)


def _over_vocabulary(
    normaliser: torch.Tensor, labelled: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normaliser and the label's logit over the whole vocabulary, from those of this rank's part."""
    largest = normaliser.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    sums = torch.cat([(normaliser - largest).exp(), labelled], dim=1)
    dist.all_reduce(sums, group=group)
    return largest + sums[:, :1].log(), sums[:, 1:]


def offer_loss_sum(model: Any) -> None:
    """Make ``model``, a causal language model of transformers, compute its loss without logits.

    If its forward is given ``labels`` [rows, length] (the token at the same place, or IGNORED_LABEL), it returns
    their cross-entropy under the token before, summed: a scalar. ``supervised_tokens`` may give the number
    of labels that are not ignored, which saves waiting for the device to count them; ``label_weights``
    [rows, length] what that of each label is multiplied by, and ``label_smoothing`` the share of its probability that
    is spread over all entries. ``model.sums_loss`` and ``sums_varied_loss`` become true. Without labels its forward
    is unchanged.

    Only for a model whose logits are the output of its head, unchanged (no soft cap, no factor). If the head is not
    a plain linear layer, because an adapter is on it, logits are computed after all.
    """
    plain_forward = model.forward

    def forward(
        self: Any,
        input_ids: torch.Tensor,
        *arguments: Any,
        labels: torch.Tensor | None = None,
        supervised_tokens: int | None = None,
        label_weights: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
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
        weights = None if label_weights is None else F.pad(label_weights[:, 1:], (0, 1)).flatten()[where]
        head = self.get_output_embeddings()
        group = getattr(head, "vocabulary_group", None)  # tensor-parallel ranks, each with a part of the rows
        if (type(head) is not torch.nn.Linear and group is None) or head.bias is not None:
            logits = plain_forward(input_ids, *arguments, **keywords).logits.flatten(0, 1)
            given: Any = {"label_smoothing": label_smoothing}
            if weights is None:
                return F.cross_entropy(logits[where].float(), following[where], reduction="sum", **given)
            return (F.cross_entropy(logits[where].float(), following[where], reduction="none", **given) * weights).sum()
        hidden = self.base_model(input_ids, *arguments, **keywords).last_hidden_state.flatten(0, 1)
        # The weight is read from the head within this forward, where ZeRO-3 gathers it.
        variation = Variation(label_smoothing, weights)
        return linear_cross_entropy(hidden[where], head.weight, following[where], group, variation)

    forward.__signature__ = _signature(forward, plain_forward)  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)
    model.sums_loss = model.sums_varied_loss = True


def _signature(forward: Any, plain_forward: Any) -> inspect.Signature:
    """That of ``plain_forward``, which is bound, with the keywords that only ``forward``, which is not, has.

    transformers looks there for what it may pass, such as ``position_ids`` in generation.
    """
    (first, *own), plain = (list(inspect.signature(each).parameters.values()) for each in (forward, plain_forward))
    known = {each.name for each in plain}
    added = [each for each in own if each.kind is each.KEYWORD_ONLY and each.name not in known]
    return inspect.Signature([first, *sorted([*plain, *added], key=lambda each: each.kind)])
