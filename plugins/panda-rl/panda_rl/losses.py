"""The losses of group relative policy optimisation, as functions of tensors. Imports torch: import it in functions.

Shapes: ``rows`` completions with ``length`` tokens at most; log probabilities and masks are [rows, length].
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

SMALLEST_SPREAD = 1e-4
"""Added to the standard deviation that rewards are divided by, as TRL has it."""


@dataclass(frozen=True)
class LossType:
    """One of the losses of the field: what is clipped, and what the step's sum is divided by."""

    level: Literal["token", "sequence"]
    """Whether the ratio of probabilities is that of a token, or the geometric mean over a completion."""
    unit: Literal["completions", "completion_tokens"]
    """The sum over a step is divided by the number of these in the step."""
    row_scale: Callable[[torch.Tensor, int], torch.Tensor]
    """From the tokens of each completion [rows] and ``max_completion_length``: the factor of its summed loss [rows]."""


def _of_mean(lengths: torch.Tensor, most: int) -> torch.Tensor:
    return 1 / lengths.clamp(min=1)


def _of_sum(lengths: torch.Tensor, most: int) -> torch.Tensor:
    return torch.ones_like(lengths)


def _of_constant(lengths: torch.Tensor, most: int) -> torch.Tensor:
    return torch.full_like(lengths, 1 / most)


LOSS_TYPES: Mapping[str, LossType] = {
    "grpo": LossType("token", "completions", _of_mean),  # arXiv 2402.03300
    "bnpo": LossType("token", "completion_tokens", _of_sum),  # as TRL has it, of a batch that is not split
    "dapo": LossType("token", "completion_tokens", _of_sum),  # arXiv 2503.14476
    "dr_grpo": LossType("token", "completions", _of_constant),  # arXiv 2503.20783
    "gspo": LossType("sequence", "completions", _of_mean),  # arXiv 2507.18071
}


def centred(rewards: torch.Tensor) -> torch.Tensor:
    """``rewards`` [prompts, generations] less the mean of each prompt."""
    return rewards - rewards.mean(dim=1, keepdim=True)


def spread_of_groups(rewards: torch.Tensor) -> torch.Tensor:
    """The standard deviation of each prompt's ``rewards`` [prompts, generations], at least two: [prompts, 1]."""
    return rewards.std(dim=1, keepdim=True)


def spread_of_all(count: torch.Tensor, total: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """The standard deviation of ``count`` numbers, from their ``total`` and that of their ``squares``: a scalar."""
    variance = (squares - total * total / count) / (count - 1).clamp(min=1)
    return variance.clamp(min=0).sqrt()


@dataclass(frozen=True)
class Terms:
    """What each token contributes, before anything is summed."""

    loss: torch.Tensor
    """[rows, length]"""
    kl: torch.Tensor | None
    """[rows, length], the estimate of the KL to the reference (Schulman's k3); None without one."""
    clipped_low: torch.Tensor
    """bool, [rows, length] or, of a sequence, [rows, 1]: a worse completion whose ratio has left the range below."""
    clipped_high: torch.Tensor
    """The same of a better one, above."""


def terms(
    log_probs: torch.Tensor,
    old: torch.Tensor,
    reference: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    level: str,
    epsilon: float,
    epsilon_high: float,
    beta: float,
    weighted_kl: bool,
) -> Terms:
    """The clipped surrogate of each token, with ``beta`` times its KL to ``reference``.

    With ``weighted_kl`` the KL is multiplied by the ratio, through which its gradient is that of the KL from the policy
    to the reference, without bias (arXiv 2512.02556, section 3.1).

    ``log_probs``, and those when the completions were made, ``old``, and under ``reference``: of each token;
    ``advantages`` [rows]; ``mask`` is 1 at tokens of completions, of which a row may have none.
    """
    log_ratio = (log_probs - old) * mask
    if level == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp()
    advantage = advantages.unsqueeze(1)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    loss = -torch.min(ratio * advantage, clipped * advantage)
    kl = None
    if reference is not None:
        difference = (reference - log_probs) * mask
        kl = difference.exp() - difference - 1
        if weighted_kl:
            kl = kl * ratio
        loss = loss + beta * kl
    low = (ratio < 1 - epsilon) & (advantage < 0)
    high = (ratio > 1 + epsilon_high) & (advantage > 0)
    return Terms(loss.expand_as(mask), kl, low, high)


def summed(loss_type: LossType, loss: torch.Tensor, mask: torch.Tensor, max_completion_length: int) -> torch.Tensor:
    """The sum of the tokens' ``loss`` that, divided by the units of the step, is the step's loss: a scalar."""
    scale = loss_type.row_scale(mask.sum(dim=1), max_completion_length)
    return ((loss * mask).sum(dim=1) * scale).sum()
