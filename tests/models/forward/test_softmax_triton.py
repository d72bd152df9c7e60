"""The kernels of the cross-entropy beside float64: on a GPU, and without one in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so without a GPU these tests run in a process of their own.
"""

from __future__ import annotations

import pytest
import torch
from interpreted import DEVICE
from interpreted import INTERPRETED
from interpreted import anywhere
from interpreted import passed_in_interpreter
from interpreted import with_numpy

pytest.importorskip("triton")

DTYPES = [torch.float16, *[torch.bfloat16] * (not INTERPRETED)]  # the interpreter (3.7) takes bf16 for integers


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels themselves run")
@with_numpy
def test_the_kernels_in_tritons_interpreter() -> None:
    assert " 16 passed" in passed_in_interpreter(__file__, "float64")


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_kernels_compile_for_a_hopper(dtype: str, weighted: bool) -> None:
    """The interpreter takes what the compiler refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from panda.models.forward.softmax_triton import BLOCK
    from panda.models.forward.softmax_triton import _gradient
    from panda.models.forward.softmax_triton import _normaliser

    target, numbers = GPUTarget("cuda", 90, 32), {"entries": "i32", "spread": "fp32"}
    for kernel, signature, constants in (
        (_normaliser, {"logits": f"*{dtype}", "result": "*fp32", "entries": "i32"}, {"block": BLOCK}),
        (
            _gradient,
            {"logits": f"*{dtype}", "normaliser": "*fp32", "label": "*i64", "at_label": "*fp32", "weights": "*fp32"}
            | numbers,
            {"has_weights": weighted, "block": BLOCK},
        ),
    ):
        source = ASTSource(fn=kernel, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
        compiled = triton.compile(source, target=target, options={"num_warps": 8})
        assert "ex2.approx" in compiled.asm["ptx"]


@anywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "entries", "width"), [(3, 101, 1), (2, 4096, 8), (3, 9001, 8), (2, 64, 300)])
def test_they_are_those_of_float64(
    rows: int, entries: int, width: float, smoothing: float, weighted: bool, dtype: torch.dtype
) -> None:
    """For rows of less than a block and of several, and logits of which the largest alone would overflow."""
    from panda.models.forward.softmax_triton import gradient_in_place
    from panda.models.forward.softmax_triton import normaliser

    generator = torch.Generator().manual_seed(entries)
    logits = (torch.randn(rows, entries, generator=generator) * width).to(DEVICE, dtype)
    logits[0, :] = logits[0, :].sort().values  # the largest comes last
    logits[1, : entries // 2 + 1] = float("-inf")  # a whole block of the longest rows
    label = torch.randint(entries, (rows, 1), generator=generator).to(DEVICE)
    at_label = torch.tensor([1 - smoothing] * (rows - 1) + [0.0], device=DEVICE).unsqueeze(1)
    weights = torch.rand(rows, 1, generator=generator).to(DEVICE) if weighted else None
    exact = logits.double()
    of_rows = exact.logsumexp(1, keepdim=True)
    found = normaliser(logits)
    torch.testing.assert_close(found.double(), of_rows, rtol=1e-6, atol=1e-6)

    spread = smoothing / entries
    right = (exact - of_rows).exp() - spread
    right.scatter_add_(1, label, -at_label.double())
    right *= 1 if weights is None else weights.double()
    result = gradient_in_place(logits, found, label, at_label, weights, spread)
    assert result.data_ptr() == logits.data_ptr()
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), right, rtol=step * 0.51, atol=torch.finfo(dtype).smallest_normal * step)
