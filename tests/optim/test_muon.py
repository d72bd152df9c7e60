"""Muon's arithmetic, against torch's own and against singular values in float64."""

from __future__ import annotations

import math

import pytest
import torch

from panda.optim.orthogonal import SCALES
from panda.optim.orthogonal import Muon
from panda.optim.orthogonal import newton_schulz

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(12, 8), (8, 12), (9, 9)]


def by_singular_values(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The same polynomial, of the singular values: without a product of three matrices."""
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum(-1, keepdim=True).sqrt()
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return u @ torch.diag_embed(values) @ v


@pytest.mark.parametrize("shape", [*SHAPES, (4, 6, 5), (3, 5, 6)])
def test_newton_schulz_is_a_polynomial_of_singular_values(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    expected = by_singular_values(matrix)
    assert torch.allclose(newton_schulz(matrix, 5).double(), expected, atol=1e-5)
    assert torch.allclose(newton_schulz(matrix.double() * 1e3, 5), expected, atol=1e-9)  # whatever its norm
    if len(shape) == 3:
        assert torch.allclose(newton_schulz(matrix[1], 5).double(), expected[1], atol=1e-5)
    assert torch.equal(newton_schulz(torch.zeros(shape), 5), torch.zeros(shape))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scale", "of_torch"), [("adamw", "match_rms_adamw"), ("spectral", "original")])
def test_ten_steps_are_those_of_torch(nesterov: bool, scale: str, of_torch: str) -> None:
    """torch's iterates in bf16 only."""
    torch.manual_seed(1)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [torch.nn.Parameter(each.detach().clone()) for each in ours]
    common = {"lr": 0.03, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    muon = Muon(ours, **common, scale=scale, dtype=torch.bfloat16)  # type: ignore[arg-type]
    reference = torch.optim.Muon(theirs, **common, adjust_lr_fn=of_torch)
    for _ in range(10):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        muon.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


def test_a_step_is_as_long_as_those_of_adamw() -> None:
    """Singular values of 0.7 to 1.2: the root mean square is 0.2 to some 20 %, for any shape."""
    torch.manual_seed(2)
    for rows, columns in [(64, 64), (256, 32), (32, 128)]:
        step = newton_schulz(torch.randn(rows, columns), 5) * SCALES["adamw"](rows, columns)
        assert 0.16 < step.square().mean().sqrt() < 0.24
    assert SCALES["spectral"](400, 100) == 2 and SCALES["spectral"](100, 400) == 1


def test_other_groups_are_stepped_as_by_adamw() -> None:
    torch.manual_seed(3)
    ours, theirs = (torch.nn.Parameter(torch.ones(7, 3)) for _ in range(2))
    settings = {"lr": 0.01, "weight_decay": 0.1}
    muon = Muon([{"params": [ours], "orthogonal": False, **settings}], betas=(0.8, 0.9), eps=1e-5)
    adamw = torch.optim.AdamW([theirs], **settings, betas=(0.8, 0.9), eps=1e-5, fused=True)
    for _ in range(5):
        ours.grad = torch.randn(7, 3)
        theirs.grad = ours.grad.clone()
        muon.step()
        adamw.step()
    assert torch.equal(ours, theirs)
    assert set(muon.state[ours]) == {"step", "exp_avg", "exp_avg_sq"} and muon.state[ours]["step"] == 5


def test_a_matrix_has_one_moment() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    muon = Muon([weight])
    weight.grad = torch.randn(4, 3)
    muon.step()
    assert set(muon.state[weight]) == {"exp_avg"}
    assert math.isclose(weight.grad.norm() * 0.05, muon.state[weight]["exp_avg"].norm(), rel_tol=1e-5)
