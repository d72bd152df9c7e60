"""Lion against its definition in float64."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from panda import UserError
from panda.registry.contexts import OptimizerContext
from panda.registry.options import build

from panda_example.lion import LionOptions
from panda_example.lion import build_lion
from panda_example.stepping import Lion

STEPS = 7


def reference(
    weights: Iterable[float], gradients: Iterable[Iterable[float]], lr: float, decay: float, b1: float, b2: float
) -> list[float]:
    """Algorithm 2 of arXiv 2302.06675, number by number; ``gradients`` has the steps of each weight."""
    ends = []
    for weight, steps in zip(weights, gradients, strict=True):
        momentum = 0.0
        for gradient in steps:
            mixed = b1 * momentum + (1 - b1) * gradient
            weight -= lr * ((mixed > 0) - (mixed < 0) + decay * weight)
            momentum = b2 * momentum + (1 - b2) * gradient
        ends.append(weight)
    return ends


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.8), (0.0, 0.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_equals_the_reference(decay: float, betas: tuple[float, float], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 4).to(dtype), torch.randn(STEPS, 5, 4).to(dtype)
    gradients[:, 0] = 0  # the sign of zero is zero
    parameter = torch.nn.Parameter(start.clone())
    context = OptimizerContext([{"params": [parameter], "lr": 0.01, "weight_decay": decay}], torch.device("cpu"))
    optimizer = build_lion(LionOptions(lion_betas=betas), context)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    expected = reference(start.flatten().tolist(), gradients.flatten(1).T.tolist(), 0.01, decay, *betas)
    torch.testing.assert_close(
        parameter.detach().double().flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance
    )


def test_any_sharding_gives_the_same_bits() -> None:
    """What ZeRO does: parameters joined into one tensor, and cut without regard to their shapes."""
    torch.manual_seed(0)
    start, gradients = torch.randn(30), torch.randn(STEPS, 30)

    def trained(cuts: list[int]) -> torch.Tensor:
        parts = [torch.nn.Parameter(part.clone()) for part in start.split(cuts)]
        optimizer = Lion(parts, lr=0.01, weight_decay=0.1)
        for gradient in gradients:
            for part, piece in zip(parts, gradient.split(cuts), strict=True):
                part.grad = piece.clone()
            optimizer.step()
        return torch.cat([part.detach() for part in parts])

    assert torch.equal(trained([30]), trained([7, 1, 22]))


def test_state_survives_saving() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(4, 6)

    def step(optimizer: Lion, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        parameter.grad = gradient.clone()
        optimizer.step()

    first = torch.nn.Parameter(torch.ones(6))
    optimizer = Lion([first], lr=0.01)
    for gradient in gradients[:2]:
        step(optimizer, first, gradient)
    second = torch.nn.Parameter(first.detach().clone())
    resumed = Lion([second], lr=0.5)
    resumed.load_state_dict(optimizer.state_dict())
    for gradient in gradients[2:]:
        step(optimizer, first, gradient)
        step(resumed, second, gradient)
    assert torch.equal(first, second)


def test_a_parameter_without_gradient_stays() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = Lion([parameter], lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3))
    assert not optimizer.state


@pytest.mark.parametrize("betas", [(1.0, 0.99), (0.9, -0.1), (0.9,), "0.9, 1.5"])
def test_options_have_bounds(betas: object) -> None:
    with pytest.raises(UserError, match="lion_betas"):
        build(LionOptions, {"lion_betas": betas})
