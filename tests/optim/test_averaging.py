"""Schedule-free AdamW against algorithm 1 of arXiv 2405.15682 in float64, with x, y and z written out."""

from __future__ import annotations

import pytest
import torch

from panda.optim.averaging import ScheduleFreeAdamW
from panda.optim.schedule_free import ScheduleFreeOptions
from panda.registry import UserError
from panda.registry.options import build

BETAS, EPSILON, DECAY = (0.9, 0.95), 1e-5, 0.1
RATES = [0.0, 0.01, 0.03, 0.03, 0.02, 0.03, 0.03, 0.03]


def gradient(step: int, at: torch.Tensor) -> torch.Tensor:
    """Of a quadratic, so that it depends on where it is taken."""
    return torch.linspace(1, 6, 600, dtype=at.dtype).view(2, 300) * (at - step / 3)


def reference() -> tuple[torch.Tensor, torch.Tensor]:
    """x and y after all steps."""
    z = x = torch.linspace(-1, 1, 600, dtype=torch.float64).view(2, 300)
    square, total, highest = torch.zeros_like(z), 0.0, 0.0
    beta1, beta2 = BETAS
    for step, rate in enumerate(RATES, 1):
        y = (1 - beta1) * z + beta1 * x
        g = gradient(step, y)
        square = beta2 * square + (1 - beta2) * g**2
        z = z - rate * (g / ((square / (1 - beta2**step)).sqrt() + EPSILON) + DECAY * y)
        highest = max(highest, rate)
        total += highest**2
        share = highest**2 / total if total else 0.0
        x = (1 - share) * x + share * z
    return x, (1 - beta1) * z + beta1 * x


def trained(*, looking: bool) -> tuple[torch.Tensor, ScheduleFreeAdamW]:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 600).view(2, 300))
    optimizer = ScheduleFreeAdamW([weight], betas=BETAS, eps=EPSILON, weight_decay=DECAY)
    for step, rate in enumerate(RATES, 1):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = gradient(step, weight.detach())
        optimizer.step()
        if looking:
            optimizer.eval_weights()
            optimizer.eval_weights()  # again: still the same
            optimizer.train_weights()
            optimizer.train_weights()
    return weight, optimizer


def test_it_trains_at_y_and_evaluates_at_x() -> None:
    x, y = reference()
    weight, optimizer = trained(looking=False)
    assert torch.allclose(weight.detach().double(), y, atol=1e-6)
    optimizer.eval_weights()
    assert torch.allclose(weight.detach().double(), x, atol=1e-6)
    assert not torch.allclose(x, y, atol=1e-3)


def test_looking_at_the_average_changes_no_bit() -> None:
    assert torch.equal(trained(looking=True)[0], trained(looking=False)[0])


def test_its_state_holds_what_it_goes_on_with_while_the_average_is_looked_at() -> None:
    weight, optimizer = trained(looking=False)
    held, names = weight.detach().clone(), {"step", "z", "exp_avg_sq", "highest_rate", "weight_sum"}
    assert set(optimizer.state[weight]) == names
    optimizer.eval_weights()
    assert set(optimizer.state[weight]) == {*names, "y"}
    again = ScheduleFreeAdamW([weight], betas=BETAS)
    again.load_state_dict(optimizer.state_dict())
    again.train_weights()
    assert torch.equal(weight, held) and set(again.state[weight]) == names


def test_it_needs_a_first_beta() -> None:
    with pytest.raises(UserError, match="the first has to be above 0"):
        build(ScheduleFreeOptions, {"adam_betas": [0.0, 0.9]})
