"""The losses against their papers, written again here in float64 with Python's own numbers."""

from __future__ import annotations

import math

import pytest
import torch

from panda_preference import losses

CHOSEN = [-3.0, -0.5, -40.0, 2.0, 0.0]
REJECTED = [-5.0, -0.25, -8.0, -3.0, 0.0]
PAIRS = list(zip(CHOSEN, REJECTED, strict=True))
NEGATIVE = [(-3.0, -5.0), (-0.5, -0.25), (-1e-9, -30.0), (-0.6931, -0.6932), (-12.0, -1e-6)]
"""Log-probabilities a token: at most 0."""


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def columns(pairs: list[tuple[float, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, rejected = torch.tensor(pairs, dtype=torch.float64).T
    return chosen, rejected


def same(found: torch.Tensor, expected: list[float]) -> None:
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_dpo() -> None:
    same(losses.dpo(*columns(PAIRS), 0.3), [-math.log(sigmoid(0.3 * (c - r))) for c, r in PAIRS])


def test_ipo() -> None:
    same(losses.ipo(*columns(PAIRS), 0.3), [(c - r - 1 / 0.6) ** 2 for c, r in PAIRS])


def test_simpo() -> None:
    same(losses.simpo(*columns(PAIRS), 2.0, 0.7), [-math.log(sigmoid(2 * (c - r) - 0.7)) for c, r in PAIRS])


def test_orpo_is_the_log_of_the_sigmoid_of_the_ratio_of_odds() -> None:
    def odds(log_probability: float) -> float:
        return math.exp(log_probability) / -math.expm1(log_probability)

    expected = [-0.4 * math.log(sigmoid(math.log(odds(c) / odds(r)))) for c, r in NEGATIVE]
    same(losses.orpo(*columns(NEGATIVE), 0.4), expected)


def test_orpo_is_finite_where_a_completion_is_certain() -> None:
    """A log-probability of 0 has infinite odds: in float32 a mean of them rounds to it."""
    certain = torch.tensor([0.0, -1.0, 0.0, -1e-30], requires_grad=True)
    other = torch.tensor([-1.0, 0.0, 0.0, -200.0], requires_grad=True)
    found = losses.orpo(certain, other, 0.1)
    found.sum().backward()
    assert found.isfinite().all()
    assert certain.grad is not None and not certain.grad.isnan().any()
    assert other.grad is not None and not other.grad.isnan().any()


def test_kto() -> None:
    beta, kl, weights = 0.5, 0.4, {True: 1.5, False: 0.75}
    desirable = [True, False, True, False, True]
    expected = [
        weights[good] * (1 - sigmoid(beta * (ratio - kl if good else kl - ratio)))
        for ratio, good in zip(CHOSEN, desirable, strict=True)
    ]
    kl_of_step = torch.tensor(kl, dtype=torch.float64)
    ratios = torch.tensor(CHOSEN, dtype=torch.float64)
    same(losses.kto(ratios, torch.tensor(desirable), kl_of_step, beta, weights[True], weights[False]), expected)


def test_bradley_terry() -> None:
    margins, centering = [0.0, 1.0, 2.0, 0.5, 3.0], 0.01
    expected = [
        -math.log(sigmoid(c - r - margin)) + centering * (c + r) ** 2
        for (c, r), margin in zip(PAIRS, margins, strict=True)
    ]
    found = losses.bradley_terry(*columns(PAIRS), torch.tensor(margins, dtype=torch.float64), centering)
    same(found, expected)


@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence(direction: str, temperature: float) -> None:
    student, teacher = [[0.0, 1.0, -2.0], [5.0, 5.0, 5.0]], [[1.0, 1.0, 0.5], [-1.0, 0.0, 9.0]]

    def probabilities(logits: list[float]) -> list[float]:
        weights = [math.exp(each / temperature) for each in logits]
        return [weight / sum(weights) for weight in weights]

    expected = []
    for ours, theirs in zip(student, teacher, strict=True):
        over, under = (ours, theirs) if direction == "reverse_kl" else (theirs, ours)
        both = zip(probabilities(over), probabilities(under), strict=True)
        expected.append(sum(p * math.log(p / q) for p, q in both))
    logits = [torch.tensor(each, dtype=torch.float64) for each in (student, teacher)]
    same(losses.divergence(*logits, direction, temperature), expected)


@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl"])
def test_a_token_that_neither_model_can_write_adds_nothing(direction: str) -> None:
    """Models whose vocabularies were filled up give the rows that mean nothing minus infinity."""
    student = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    found = losses.divergence(student, torch.tensor([[1.0, 0.0, -torch.inf]]), direction)
    found.sum().backward()
    assert found.isfinite().all() and student.grad is not None and student.grad.isfinite().all()
    assert found.item() == pytest.approx(
        losses.divergence(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), direction).item()
    )


@pytest.mark.parametrize("name", ["dpo", "simpo", "bradley_terry"])
def test_no_pair_is_too_different(name: str) -> None:
    """The logarithm of a sigmoid: a difference of thousands is no infinity."""
    arguments = {"dpo": (1.0,), "simpo": (1.0, 0.5), "bradley_terry": ()}[name]
    chosen = torch.tensor([-5000.0, 5000.0], requires_grad=True)
    found = getattr(losses, name)(chosen, -chosen, *arguments)
    found.sum().backward()
    assert found.isfinite().all() and chosen.grad is not None and chosen.grad.isfinite().all()
