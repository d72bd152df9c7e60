"""NVLAMB has one trust ratio a parameter under every sharding: each trajectory is that of one process in float64."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import lamb_steps
import numpy as np
import pytest
import torch
from lamb_reference import ReferenceLamb
from launching import EVERY_WAY
from launching import run_script

CLIPS = {"network": 2.0, "terms": 7.5}
"""Below the norm of some steps and above that of others, by the test that says so."""

SMALL_BUCKETS = {"reduce_bucket_size": 200, "allgather_bucket_size": 200}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def network(stage: int, **zero: Any) -> dict[str, Any]:
    return {
        "network": "network",
        "options": {"zero_stage": stage, "max_grad_norm": CLIPS["network"]},
        "deepspeed": {"zero_optimization": zero},
    }


def terms(stage: int, **zero: Any) -> dict[str, Any]:
    return {
        "network": "terms",
        "options": {"zero_stage": stage, "max_grad_norm": CLIPS["terms"], "precision": "bf16"},
        "deepspeed": {"zero_optimization": zero},
    }


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    **{f"zero-{stage}": network(stage) for stage in range(4)},
    "zero-2-decayed": network(2) | {"adapt": "decayed"},
    "zero-2-small-buckets": network(2, **SMALL_BUCKETS),
    "zero-2-not-contiguous": network(2, contiguous_gradients=False),
    "zero-1-round-robin": network(1, round_robin_gradients=True),
    "zero-2-round-robin": network(2, round_robin_gradients=True),
    "zero-1-aligned": network(1, parameter_alignment=True),
    "zero-2-aligned-round-robin": network(2, parameter_alignment=True, round_robin_gradients=True),
    "zero-3-sub-groups": network(3, sub_group_size=20, stage3_param_persistence_threshold=0),
    "zero-1-offload": network(1, **OFFLOAD),
    "zero-2-offload": network(2, **OFFLOAD),
    "zero-3-offload": network(3, **OFFLOAD, offload_param={"device": "cpu"}),
    **{f"bf16-zero-{stage}": terms(stage) for stage in range(4)},
    "bf16-zero-1-offload": terms(1, **OFFLOAD),
    "bf16-zero-3-offload": terms(3, **OFFLOAD),
}
NAIVE = {f"naive-zero-{stage}": network(stage) | {"naive": True} for stage in (1, 2, 3)}
ALONE = [name for name in CONFIGURATIONS if name.removeprefix("bf16-") in ("zero-0", "zero-1", "zero-2", "zero-3")]
TRIED = {1: ALONE, 2: [*(CONFIGURATIONS if EVERY_WAY else ALONE), *NAIVE], 3: list(CONFIGURATIONS)}
"""By number of ranks. Alone, what DeepSpeed does to spread things has nothing to spread; three ranks share nothing
evenly, and find what two do."""
CASES = [(ranks, name) for ranks, names in TRIED.items() for name in names if name not in NAIVE]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A folder for each number of ranks."""
    folders = {}
    for ranks, names in TRIED.items():
        folder = folders[ranks] = tmp_path_factory.mktemp(f"ranks{ranks}")
        chosen = {name: (CONFIGURATIONS | NAIVE)[name] for name in names}
        (folder / "configurations.json").write_text(json.dumps(chosen))
        run_script(Path(lamb_steps.__file__), folder / "configurations.json", folder, ranks=ranks, cwd=folder)
    return folders


def reference(configuration: dict[str, Any]) -> tuple[ReferenceLamb, list[float]]:
    """Where one process in float64 comes to without panda's engine and optimizer; and the norm at each step."""
    return _reference(
        configuration["network"],
        configuration["options"].get("precision", "fp32"),
        configuration["options"]["max_grad_norm"],
        configuration.get("adapt", "all"),
    )


@cache
def _reference(network: str, precision: str, max_grad_norm: float, adapt: str) -> tuple[ReferenceLamb, list[float]]:
    module = lamb_steps.make_network(network)
    if precision == "bf16":
        module = module.bfloat16()  # what the masters are copied from
    module = module.double()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    lamb = ReferenceLamb(
        {name: p.detach().numpy().copy() for name, p in trained.items()},
        betas=lamb_steps.BETAS,
        epsilon=lamb_steps.EPSILON,
        decay={name: lamb_steps.DECAY * (p.ndim > 1) for name, p in trained.items()},
        rates={name: lamb_steps.RATE * (1 if p.ndim > 1 else 2) for name, p in trained.items()},
        max_grad_norm=max_grad_norm,
        only_decayed=adapt == "decayed",
    )
    norms = []
    for step in range(lamb_steps.STEPS):
        module.zero_grad()
        for batch in lamb_steps.micro_batches(step, 0, 1):
            (lamb_steps.loss_sum(module, batch) / sum(lamb_steps.COUNTS)).backward()
        gradients = {name: p.grad.numpy() for name, p in trained.items() if p.grad is not None}
        norms.append(float(np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))))
        lamb.step(gradients, 1.0 + step % 3)
        for name, p in trained.items():
            p.data = torch.tensor(lamb.weights[name])
    return lamb, norms


def error(result: Path, configuration: dict[str, Any]) -> float:
    """Largest difference of an element, over the norm of its tensor."""
    weights = torch.load(result)["weights"]
    expected = reference(configuration)[0].weights
    assert expected.keys() <= weights.keys()
    return max(
        float((weights[name].double() - torch.tensor(value)).abs().max() / np.linalg.norm(value))
        for name, value in expected.items()
    )


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_every_sharding_follows_one_process_in_float64(results: dict[int, Path], ranks: int, name: str) -> None:
    assert error(results[ranks] / f"{name}.pt", CONFIGURATIONS[name]) < 1e-6


@pytest.mark.parametrize("name", NAIVE)
def test_a_ratio_for_each_flat_tensor_does_not(results: dict[int, Path], name: str) -> None:
    """The negative control: LAMB that nobody tells where parameters begin."""
    assert error(results[2] / f"{name}.pt", NAIVE[name]) > 1e-2


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_a_resumed_run_ends_with_the_same_bits(results: dict[int, Path], ranks: int, name: str) -> None:
    result = torch.load(results[ranks] / f"{name}.pt")
    assert all(torch.equal(weight, result["resumed"][key]) for key, weight in result["weights"].items())


@pytest.mark.parametrize("name", ["zero-0", "zero-1-round-robin", "zero-2-aligned-round-robin", "zero-3-sub-groups"])
def test_trust_ratios_are_those_of_the_reference(results: dict[int, Path], name: str) -> None:
    expected = reference(CONFIGURATIONS[name])[0].ratios
    found = torch.load(results[3] / f"{name}.pt")["ratios"]
    assert found == {name: pytest.approx(ratio, rel=1e-5) for name, ratio in expected.items()}


@pytest.mark.parametrize("name", ["zero-0", "bf16-zero-0"])
def test_clipping_is_active_in_some_steps_and_not_in_others(name: str) -> None:
    _, norms = reference(CONFIGURATIONS[name])
    assert min(norms) < CLIPS[CONFIGURATIONS[name]["network"]] < max(norms)
