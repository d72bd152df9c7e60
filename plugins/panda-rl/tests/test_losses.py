"""The losses against their definitions, written out token by token in float64."""

from __future__ import annotations

import math
import random
import typing
from typing import Any

import pytest
import torch
from panda import UserError
from panda.registry.options import build

from panda_rl.grpo import GrpoOptions
from panda_rl.losses import LOSS_TYPES
from panda_rl.losses import centred
from panda_rl.losses import spread_of_all
from panda_rl.losses import spread_of_groups
from panda_rl.losses import summed
from panda_rl.losses import terms

ROWS, LENGTH, MOST = 5, 6, 8
LENGTHS = [6, 1, 0, 4, 3]


def drawn() -> dict[str, torch.Tensor]:
    """Log probabilities of now, of when completions were drawn and of the reference; advantages; the mask."""
    draws = torch.Generator().manual_seed(3)

    def log_probs() -> torch.Tensor:
        return -torch.rand(ROWS, LENGTH, generator=draws, dtype=torch.float64) * 3

    log_probs_now = log_probs()
    mask = torch.zeros(ROWS, LENGTH, dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        mask[row, LENGTH - length :] = 1
    return {
        "log_probs": log_probs_now,
        "old": log_probs_now + 0.6 * (torch.rand(ROWS, LENGTH, generator=draws, dtype=torch.float64) - 0.5),
        "reference": log_probs(),
        "advantages": torch.tensor([1.5, -0.5, 1.0, -2.0, 0.7], dtype=torch.float64),
        "mask": mask,
    }


def expected(
    name: str, values: dict[str, Any], epsilon: float, epsilon_high: float, beta: float, weighted: bool = True
) -> float:
    """The step's loss: arXiv 2402.03300 eq. 3, 2503.14476 eq. 8, 2503.20783 eq. 3, 2507.18071 eq. 5;
    the weight of the KL: 2512.02556 eq. 7."""
    now, old, reference = (values[key].tolist() for key in ("log_probs", "old", "reference"))
    mask, advantages = values["mask"].tolist(), values["advantages"].tolist()
    of_rows = []
    for row in range(ROWS):
        tokens = [place for place in range(LENGTH) if mask[row][place]]
        mean_ratio = math.exp(sum(now[row][t] - old[row][t] for t in tokens) / max(1, len(tokens)))
        losses = []
        for t in tokens:
            ratio = mean_ratio if name == "gspo" else math.exp(now[row][t] - old[row][t])
            bounded = min(max(ratio, 1 - epsilon), 1 + epsilon_high)
            surrogate = min(ratio * advantages[row], bounded * advantages[row])
            difference = reference[row][t] - now[row][t]
            kl = (math.exp(difference) - difference - 1) * (ratio if weighted else 1)
            losses.append(-surrogate + beta * kl)
        of_rows.append(losses)
    if name in ("grpo", "gspo"):
        return sum(sum(losses) / max(1, len(losses)) for losses in of_rows) / ROWS
    if name == "dr_grpo":
        return sum(map(sum, of_rows)) / (ROWS * MOST)
    return sum(map(sum, of_rows)) / sum(map(len, of_rows))


def found(
    name: str, values: dict[str, Any], epsilon: float, epsilon_high: float, beta: float, weighted: bool = True
) -> Any:
    loss_type = LOSS_TYPES[name]
    bounds = {"epsilon": epsilon, "epsilon_high": epsilon_high}
    found = terms(**values, level=loss_type.level, **bounds, beta=beta, weighted_kl=weighted)
    total = summed(loss_type, found.loss, values["mask"], MOST)
    return total / {"completions": ROWS, "completion_tokens": sum(LENGTHS)}[loss_type.unit]


@pytest.mark.parametrize("name", LOSS_TYPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("bounds", [(0.2, 0.2, 0.0), (0.1, 0.28, 0.3), (0.01, 0.02, 1.0)])
def test_a_loss_equals_its_definition(name: str, bounds: tuple[float, float, float], weighted: bool) -> None:
    values = drawn()
    ours = found(name, values, *bounds, weighted)
    assert float(ours) == pytest.approx(expected(name, values, *bounds, weighted), rel=0, abs=1e-12)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_gradients_equal_those_of_the_definition(name: str) -> None:
    """By differences of the definition, away from the corners of the clipping."""
    values = drawn()
    values["log_probs"].requires_grad_()
    found(name, values, 0.1, 0.28, 0.3).backward()
    gradient = values["log_probs"].grad
    values = drawn()
    for row in range(ROWS):
        for place in range(LENGTH):
            either = []
            for step in (1e-6, -1e-6):
                moved = dict(values, log_probs=values["log_probs"].clone())
                moved["log_probs"][row, place] += step
                either.append(expected(name, moved, 0.1, 0.28, 0.3))
            assert float(gradient[row, place]) == pytest.approx((either[0] - either[1]) / 2e-6, abs=1e-8)


def test_what_is_clipped_is_counted() -> None:
    """By the signs of advantages: only a ratio that has gone where its advantage pushes is clipped."""
    zero = torch.zeros(4, 1, dtype=torch.float64)
    values = {
        "log_probs": torch.tensor([[0.5], [-0.5], [0.5], [-0.5]], dtype=torch.float64),
        "old": zero,
        "reference": None,
        "advantages": torch.tensor([1.0, 1.0, -1.0, -1.0]),
        "mask": zero + 1,
    }
    for level in ("token", "sequence"):
        got = terms(**values, level=level, epsilon=0.2, epsilon_high=0.2, beta=0.0, weighted_kl=True)
        assert got.clipped_high.flatten().tolist() == [True, False, False, False]
        assert got.clipped_low.flatten().tolist() == [False, False, False, True]
        assert got.kl is None


def test_a_row_without_tokens_has_no_loss_and_no_gradient() -> None:
    values = drawn()
    values["log_probs"].requires_grad_()
    for name in LOSS_TYPES:
        found(name, values, 0.2, 0.2, 0.1).backward()
    assert values["log_probs"].grad[2].eq(0).all() and values["log_probs"].grad.isfinite().all()


def test_spreads_are_standard_deviations() -> None:
    random.seed(0)
    rewards = torch.tensor([[random.gauss(2, 3) for _ in range(4)] for _ in range(3)], dtype=torch.float64)
    parts = [torch.stack([torch.ones_like(row), row, row**2]).sum(1) for row in rewards]
    assert float(spread_of_all(*sum(parts))) == pytest.approx(float(rewards.std()), abs=1e-12)
    for row, mean, spread in zip(rewards, centred(rewards), spread_of_groups(rewards), strict=True):
        values = row.tolist()
        average = sum(values) / 4
        assert mean.tolist() == pytest.approx([value - average for value in values], abs=1e-12)
        variance = sum((value - average) ** 2 for value in values) / 3
        assert float(spread) == pytest.approx(math.sqrt(variance), abs=1e-12)
    equal = torch.full((7,), 1 / 3, dtype=torch.float64)
    assert float(spread_of_all(torch.tensor(7.0), equal.sum(), (equal**2).sum())) < 1e-7, "and no root of less than 0"


def test_the_option_has_every_loss_type() -> None:
    assert set(typing.get_args(typing.get_type_hints(GrpoOptions)["loss_type"])) == set(LOSS_TYPES)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "name at least one"),
        ({"reward": ("length",), "reward_weights": (1.0, 2.0)}, "it has 2, and `reward` has 1: length"),
        ({"reward": ("length",), "num_generations": 1}, "num_generations"),
        ({"reward": ("length",), "temperature": 0}, "temperature"),
        ({"reward": ("length",), "top_p": 1.5}, "top_p"),
        ({"reward": ("length",), "loss_type": "ppo"}, "one of grpo, bnpo, dr_grpo, dapo, gspo"),
    ],
)
def test_options_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(GrpoOptions, values)
