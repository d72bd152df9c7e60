"""The kernels of NVLAMB beside its definition: on a GPU, and without one in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so without a GPU these tests run in a process of their own.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreted import DEVICE
from interpreted import INTERPRETED
from interpreted import anywhere
from interpreted import passed_in_interpreter
from interpreted import with_numpy
from lamb_reference import ReferenceLamb

from panda.files.compilers import can_compile
from panda.optim import layerwise
from panda.optim.layerwise import NVLamb
from panda.registry.contexts import ParameterLayout
from panda.registry.contexts import Segment
from panda.registry.contexts import TensorLayout

on_a_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")
STEPS = 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, which takes a millisecond for what a GPU does at once."""
    if INTERPRETED:
        from panda.optim import layerwise_triton

        monkeypatch.setattr(layerwise, "_arithmetic", lambda layouts: layerwise_triton)  # also for tensors on the CPU
        for name, value in {"CHUNK": 16, "BLOCK": 8, "CHUNKS_AT_ONCE": 4}.items():
            monkeypatch.setattr(layerwise_triton, name, value)


@pytest.mark.skipif(INTERPRETED, reason="it starts these")
@with_numpy
def test_the_kernels_compute_the_definition_in_tritons_interpreter() -> None:
    assert " 12 passed" in passed_in_interpreter(__file__)


def flat_problem(lengths: dict[str, int], gaps: list[int]) -> tuple[np.ndarray, tuple[Segment, ...]]:
    """Weights of several parameters in one tensor with padding of any content, and where they lie."""
    generator = np.random.default_rng(0)
    content, segments, at = [], [], 0
    for number, ((_, length), gap) in enumerate(zip(lengths.items(), gaps, strict=True)):
        content += [np.full(gap, 1e30), generator.normal(size=length)]
        segments.append(Segment(number, at + gap, length, 0))
        at += gap + length
    return np.concatenate([*content, [1e30]]), tuple(segments)


@anywhere
@pytest.mark.parametrize("gaps", [[0, 0, 0, 0], [4, 0, 8, 4], [1, 3, 2, 5]])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("adapt", ["all", "decayed"])
def test_the_kernels_compute_the_definition(gaps: list[int], decay: float, adapt: str) -> None:
    from panda.optim.layerwise_triton import CHUNK
    from panda.optim.layerwise_triton import CHUNKS_AT_ONCE

    # Of one that takes two rounds to sum; in the first case all begin and end where 16 bytes do.
    odd = CHUNK - 1 if any(gaps) else CHUNK - 4
    lengths = {"long": CHUNK * (CHUNKS_AT_ONCE + 2) + 12, "chunk": CHUNK, "short": 8, "odd": odd}
    content, segments = flat_problem(lengths, gaps)
    weights = {
        name: content[segment.start : segment.start + segment.length]
        for name, segment in zip(lengths, segments, strict=True)
    }
    weights["short"][:] = 0.0
    flat = torch.nn.Parameter(torch.tensor(content, dtype=torch.float32, device=DEVICE))
    reference = ReferenceLamb(
        {name: weight.copy() for name, weight in weights.items()},
        betas=(0.9, 0.999),
        epsilon=1e-6,
        decay=dict.fromkeys(lengths, decay),
        only_decayed=adapt == "decayed",
    )
    optimizer = NVLamb([flat], betas=(0.9, 0.999), eps=1e-6, weight_decay=decay, adapt=adapt)
    optimizer.bind(ParameterLayout((TensorLayout(flat, tuple(lengths), segments),), lambda squares: squares))
    assert layerwise._arithmetic(list(optimizer._layouts.values())).__name__.endswith("layerwise_triton")
    generator = np.random.default_rng(1)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate = 0.01 * (step + 1)
        gradient = np.full(len(content), 1e9)
        for segment in segments:
            gradient[segment.start : segment.start + segment.length] = generator.normal(size=segment.length)
        reference.step(
            {
                name: gradient[segment.start : segment.start + segment.length]
                for name, segment in zip(lengths, segments, strict=True)
            },
            rate,
        )
        flat.grad = torch.tensor(gradient, dtype=torch.float32, device=DEVICE)
        optimizer.step()
        assert all(not flat.grad[each.start : each.start + each.length].any() for each in segments)
    found = flat.detach().cpu().double().numpy()
    for name, segment in zip(lengths, segments, strict=True):
        expected = reference.weights[name]
        worst = np.abs(found[segment.start : segment.start + segment.length] - expected).max()
        assert worst / np.linalg.norm(expected) < 1e-6, name
    covered = sum(lengths.values())
    assert (found == np.float32(1e30)).sum() == len(content) - covered  # padding is as it was


@pytest.mark.skipif(INTERPRETED, reason="the kernels are what it asks for there")
def test_a_machine_that_cannot_compile_does_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, here the CPU, whose machine has Triton and no compiler."""
    results = []
    for on_gpu in (False, True):
        if on_gpu:
            monkeypatch.setattr(torch.Tensor, "is_cuda", True)
            monkeypatch.setenv("CXX", "no-such-compiler")
            can_compile.cache_clear()
        weight = torch.nn.Parameter(torch.arange(6.0))
        optimizer = NVLamb([weight], lr=0.01)
        weight.grad = torch.ones(6)
        optimizer.step()
        results.append(weight.detach())
    can_compile.cache_clear()
    assert torch.equal(*results)


@on_a_gpu
def test_a_step_gives_the_same_bits_each_time_and_never_waits_for_the_device() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(1000, 1001, device="cuda")) for _ in range(3)]
        optimizer = NVLamb(weights, lr=0.01, weight_decay=0.1)
        for step in range(3):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # tables are made once
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        results.append(torch.stack([weight.detach() for weight in weights]))
    assert torch.equal(*results)


@on_a_gpu
def test_the_kernels_and_torch_agree_on_whole_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    from panda.optim import layerwise_triton

    results = []
    for arithmetic in (layerwise_triton, layerwise.layerwise_torch):
        monkeypatch.setattr(layerwise, "_arithmetic", lambda layouts, arithmetic=arithmetic: arithmetic)
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in ((64, 33), (5,), (), (3, 4, 5))]
        optimizer = NVLamb(weights, lr=0.01, weight_decay=0.1)
        for _ in range(5):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        results.append([weight.detach() for weight in weights])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
