"""The losses, as functions of log-probabilities: each returns a value a pair, a sequence or a token, not their mean.

Log-probabilities are of whole completions [pairs], sums over their tokens, and means where a name says so. Everything
is computed in the dtype that is given: float32 in training.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 - the customary name


def dpo(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """DPO's loss (arXiv 2305.18290, equation 7) of each pair.

    ``chosen``, ``rejected``: log-probabilities, less those under the reference if there is one.
    """
    return -F.logsigmoid(beta * (chosen - rejected))


def ipo(mean_chosen: torch.Tensor, mean_rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """IPO's loss (arXiv 2310.12036, equation 17, where beta is tau) of each pair.

    ``mean_chosen``, ``mean_rejected``: the log-probabilities of ``dpo``, divided by the completions' tokens, as the
    authors do in their experiments and TRL does.
    """
    return (mean_chosen - mean_rejected - 1 / (2 * beta)).square()


def simpo(mean_chosen: torch.Tensor, mean_rejected: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """SimPO's loss (arXiv 2405.14734, equation 6) of each pair, of log-probabilities a token."""
    return -F.logsigmoid(beta * (mean_chosen - mean_rejected) - gamma)


def log_odds_ratio(mean_chosen: torch.Tensor, mean_rejected: torch.Tensor) -> torch.Tensor:
    """The log of the ratio of odds in ORPO's loss (arXiv 2403.07691, equation 4), of log-probabilities a token."""
    return (mean_chosen - mean_rejected) - (_log1mexp(mean_chosen) - _log1mexp(mean_rejected))


def orpo(mean_chosen: torch.Tensor, mean_rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """The part of ORPO's loss that is not cross-entropy (equation 6; beta is its lambda), of each pair."""
    return -beta * F.logsigmoid(log_odds_ratio(mean_chosen, mean_rejected))


def kto(
    log_ratios: torch.Tensor,
    desirable: torch.Tensor,
    kl: torch.Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> torch.Tensor:
    """KTO's loss (arXiv 2402.01306, equation 7) of each sequence.

    ``log_ratios`` [sequences]: log-probabilities less the reference's. ``desirable`` [sequences]: bool. ``kl``: the
    estimate of the divergence, a scalar, that no gradient flows through.
    """
    gains = beta * torch.where(desirable, log_ratios - kl, kl - log_ratios)
    weights = torch.where(desirable, desirable_weight, undesirable_weight).to(log_ratios)
    return weights * torch.sigmoid(-gains)


def bradley_terry(
    chosen: torch.Tensor, rejected: torch.Tensor, margins: torch.Tensor | float = 0.0, centering: float = 0.0
) -> torch.Tensor:
    """The loss of a reward model (arXiv 2203.02155, equation 1) of each pair of rewards.

    ``margins``: by how much a pair's rewards should differ (arXiv 2307.09288, equation 2). ``centering``: the weight of
    the square of their sum, which keeps rewards around zero (arXiv 2312.09244).
    """
    return -F.logsigmoid(chosen - rejected - margins) + centering * (chosen + rejected).square()


def divergence(student: torch.Tensor, teacher: torch.Tensor, direction: str, temperature: float = 1.0) -> torch.Tensor:
    """The Kullback-Leibler divergence between two models' next tokens, at each place.

    ``student``, ``teacher`` [places, vocabulary]: logits. ``direction``: ``forward_kl``, of the teacher from the
    student (the student covers what the teacher does); ``reverse_kl``, of the student from the teacher (it avoids
    what the teacher does not). Both are divided by ``temperature`` first; the result is not multiplied by its square.
    """
    ours, theirs = (F.log_softmax(logits / temperature, dim=-1) for logits in (student, teacher))
    over, under = {"forward_kl": (theirs, ours), "reverse_kl": (ours, theirs)}[direction]
    # A token of probability 0 adds nothing: 0 times minus infinity would be NaN, in the gradient too.
    difference = torch.where(over.isneginf(), 0.0, over - under)
    return (over.exp() * difference).sum(-1)


def _log1mexp(log_probability: torch.Tensor) -> torch.Tensor:
    """log(1 - p) of a log-probability, at most 0, exact near both ends (Mächler 2012).

    A probability of 1 in float32 would give minus infinity, and NaN for a difference of two: it is taken as the one
    before it.
    """
    below = log_probability.clamp(max=-torch.finfo(log_probability.dtype).tiny)
    near_one = below > -math.log(2)
    # Both branches are computed, and the gradient of the one not taken must be finite.
    small = torch.where(near_one, below, torch.full_like(below, -math.log(2)))
    large = torch.where(near_one, torch.full_like(below, -math.log(2)), below)
    return torch.where(near_one, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))
