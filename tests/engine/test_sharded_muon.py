"""Muon's matrices are whole under every sharding: each trajectory is that of one process in float64."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import lamb_steps
import pytest
import torch
from launching import EVERY_WAY
from launching import run_script
from test_sharded_lamb import CLIPS
from test_sharded_lamb import CONFIGURATIONS as OF_LAMB

NAMES = (
    "zero-0",
    "zero-2-small-buckets",
    "zero-1-round-robin",
    "zero-2-aligned-round-robin",
    "zero-3-sub-groups",
    "zero-3-offload",
    "bf16-zero-0",
    "bf16-zero-1",
    "bf16-zero-2",
    "bf16-zero-3",
    "bf16-zero-1-offload",
)
"""What a certificate does not try: other layouts of DeepSpeed, and master weights beside weights in bf16."""
CONFIGURATIONS = {name: OF_LAMB[name] | {"muon": True} for name in NAMES}
RANKS = (2, 3) if EVERY_WAY else (3,)
CASES = [(ranks, name) for ranks in RANKS for name in NAMES]
MOMENTUM, COEFFICIENTS = 0.95, (3.4445, -4.7750, 2.0315)
LIMIT = 1e-4


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A folder for each number of ranks."""
    folders = {}
    for ranks in RANKS:
        folder = folders[ranks] = tmp_path_factory.mktemp(f"ranks{ranks}")
        (folder / "configurations.json").write_text(json.dumps(CONFIGURATIONS))
        run_script(Path(lamb_steps.__file__), folder / "configurations.json", folder, ranks=ranks, cwd=folder)
    return folders


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz's polynomial, of the singular values."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    return u @ torch.diag(values) @ v


@cache
def reference(network: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Where one process in float64 begins, and where it comes to."""
    module = lamb_steps.make_network(network)
    module = (module.bfloat16() if network == "terms" else module).double()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    hidden = [name for name, p in trained.items() if p.ndim == 2 and not name.startswith(("embed", "head"))]
    momenta = {name: torch.zeros_like(trained[name]) for name in hidden}
    decay = {name: lamb_steps.DECAY * (p.ndim > 1) for name, p in trained.items()}
    rates = {
        name: lamb_steps.RATE * (1 if p.ndim > 1 else 2) * (1 if name in hidden else 0.5) for name, p in trained.items()
    }
    adamw = torch.optim.AdamW(
        [
            {"params": [p], "lr": rates[name], "weight_decay": decay[name]}
            for name, p in trained.items()
            if name not in hidden
        ],
        betas=lamb_steps.BETAS,
        eps=lamb_steps.EPSILON,
    )
    peaks = [group["lr"] for group in adamw.param_groups]
    for step in range(lamb_steps.STEPS):
        module.zero_grad()
        for batch in lamb_steps.micro_batches(step, 0, 1):
            (lamb_steps.loss_sum(module, batch) / sum(lamb_steps.COUNTS)).backward()
        gradients = [p.grad for p in trained.values() if p.grad is not None]
        norm = torch.cat([gradient.reshape(-1) for gradient in gradients]).norm()
        for gradient in gradients:
            gradient.mul_(min(1.0, CLIPS[network] / float(norm)))
        for name in hidden:
            weight, gradient = trained[name].data, trained[name].grad
            assert gradient is not None
            momenta[name] = MOMENTUM * momenta[name] + (1 - MOMENTUM) * gradient
            ahead = (1 - MOMENTUM) * gradient + MOMENTUM * momenta[name]
            rate = rates[name] * (1.0 + step % 3)
            weight.mul_(1 - rate * decay[name])
            weight.sub_(rate * 0.2 * max(weight.shape) ** 0.5 * orthogonal(ahead))
        for group, peak in zip(adamw.param_groups, peaks, strict=True):
            group["lr"] = peak * (1.0 + step % 3)
        adamw.step()
    return start, {name: p.detach() for name, p in trained.items()}


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_every_sharding_follows_one_process_in_float64(results: dict[int, Path], ranks: int, name: str) -> None:
    start, expected = reference(CONFIGURATIONS[name]["network"])
    weights: dict[str, Any] = torch.load(results[ranks] / f"{name}.pt")["weights"]
    for key, value in expected.items():
        distance = (value - start[key]).norm()
        assert (weights[key].double() - value).norm() < LIMIT * distance, key


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_a_resumed_run_ends_with_the_same_bits(results: dict[int, Path], ranks: int, name: str) -> None:
    result = torch.load(results[ranks] / f"{name}.pt")
    assert all(torch.equal(weight, result["resumed"][key]) for key, weight in result["weights"].items())
