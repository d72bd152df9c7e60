"""AdamW against its definition (arXiv 1711.05101, algorithm 2), in float64, written out here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from panda.optim.adam_options import AdamOptions
from panda.optim.adamw import build_adamw
from panda.registry.contexts import OptimizerContext

STEPS = 30


def reference(
    weights: np.ndarray,
    gradients: list[np.ndarray],
    rates: list[float],
    betas: tuple[float, float],
    epsilon: float,
    decay: float,
) -> np.ndarray:
    weights, mean, square = weights.copy(), np.zeros_like(weights), np.zeros_like(weights)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        update = (mean / (1 - betas[0] ** step)) / (np.sqrt(square / (1 - betas[1] ** step)) + epsilon)
        weights = weights - rate * update - rate * decay * weights
    return weights


def run(options: AdamOptions, decay: float, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The weights after some steps with a varying rate: panda's, and the reference's."""
    generator = np.random.default_rng(0)
    start = generator.normal(size=(5, 7))
    gradients = [generator.normal(size=start.shape) * 10.0 ** generator.integers(-5, 3) for _ in range(STEPS)]
    rates = [0.01 * (1 + step % 4) for step in range(STEPS)]
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=dtype))
    groups = [{"params": [parameter], "lr": 0.5, "weight_decay": decay}]
    optimizer = build_adamw(options, OptimizerContext(groups, torch.device("cpu")))
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
    expected = reference(start, gradients, rates, options.adam_betas, options.adam_epsilon, decay)
    return parameter.detach().double().numpy(), expected


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("options", [AdamOptions(), AdamOptions((0.8, 0.95), 1e-2), AdamOptions((0.0, 0.0), 0.5)])
def test_adamw_is_its_definition(options: AdamOptions, decay: float) -> None:
    found, expected = run(options, decay, torch.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_adamw_in_float32_is_its_definition_to_rounding() -> None:
    found, expected = run(AdamOptions(), 0.3, torch.float32)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-6)


def test_the_defaults_are_those_that_pandallm_documents() -> None:
    assert AdamOptions().adam_betas == (0.9, 0.99)
    assert AdamOptions().adam_epsilon == 1e-6


def test_each_group_keeps_its_own_rate_and_decay() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [
        {"params": [parameters[0]], "lr": 0.1, "weight_decay": 0.5},
        {"params": [parameters[1]], "lr": 0.2, "weight_decay": 0.0},
    ]
    optimizer = build_adamw(AdamOptions(), OptimizerContext(groups, torch.device("cpu")))
    for parameter in parameters:
        parameter.grad = torch.zeros(3)
    optimizer.step()
    assert parameters[0].tolist() == pytest.approx([0.95] * 3)
    assert parameters[1].tolist() == [1.0] * 3
