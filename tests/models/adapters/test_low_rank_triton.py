"""The product whose sum goes on with one of low rank, against float64.

Triton reads TRITON_INTERPRET when it is imported, so without a GPU its test runs in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from interpreted import DEVICE
from interpreted import INTERPRETED
from interpreted import passed_in_interpreter
from interpreted import with_numpy

pytest.importorskip("triton")

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
DTYPES = [torch.float16, *[torch.bfloat16] * (not INTERPRETED)]  # the interpreter (3.7) takes bf16 for integers


@pytest.mark.skipif(INTERPRETED or ON_HOPPER, reason="the kernel itself runs")
@with_numpy
def test_the_kernel_in_tritons_interpreter() -> None:
    assert " 6 passed" in passed_in_interpreter(__file__, "is_that")


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize(("transposed", "of_rows"), [(True, "i32"), (False, "i32"), (True, "i64")])
def test_the_kernel_compiles_for_a_hopper(transposed: bool, of_rows: str) -> None:
    """The interpreter takes what the compiler refuses; and tiles have to fit in the memory of a multiprocessor."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from panda.models.adapters.low_rank_triton import _multiply

    sizes = {"tile_rows": 128, "tile_columns": 256, "tile_depth": 64, "rank_depth": 64, "group": 8, "programs": 132}
    signature = dict.fromkeys(("x", "weight", "left", "right", "result"), "*bf16")
    signature |= {"rows": of_rows} | dict.fromkeys(("columns", "depth", "rank"), "i32")
    constants = {"transposed": transposed, **sizes}
    source = ASTSource(fn=_multiply, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3})
    assert "wgmma" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 * 1024


@pytest.mark.skipif(not INTERPRETED and not ON_HOPPER, reason="no Hopper GPU: interpreted below")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", [(1024, 64, 256, 8), (1100, 88, 264, 64), (1030, 136, 40, 136)])
def test_it_is_that_of_float64_rounded_once(
    shape: tuple[int, int, int, int], transposed: bool, dtype: torch.dtype
) -> None:
    from panda.models.adapters import low_rank_triton

    rows, depth, columns, rank = shape
    generator = torch.Generator().manual_seed(rows)

    def drawn(height: int, width: int) -> torch.Tensor:
        return torch.randint(-32, 33, (height, width), generator=generator).div(32).to(DEVICE, dtype)

    x, left = drawn(rows, depth), drawn(rows, rank)
    weight, right = drawn(depth, columns), drawn(rank, columns) / 64
    if transposed:
        weight, right = (matrix.t().contiguous().t() for matrix in (weight, right))
    assert INTERPRETED or low_rank_triton.can_multiply(x, weight, left, right)
    found = x.new_full((rows, columns), float("nan"))
    low_rank_triton.product_with_low_rank(x, weight, left, right, found)
    exact = (
        x.double() @ weight.double() + left.double() @ right.double()
    )  # all terms are multiples of 2^-16: no rounding
    assert torch.equal(found, exact.to(dtype))
    rounded_twice = (x.double() @ weight.double()).to(dtype) + (left.double() @ right.double()).to(dtype)
    assert not torch.equal(rounded_twice, found)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")
def test_code_for_any_shape_is_compiled_once_and_knows_the_kernel() -> None:
    from torch._library.triton import get_triton_kernels_for_op

    from panda.models.adapters.low_rank_triton import _multiply

    compiled = []

    def backend(graph: torch.fx.GraphModule, examples: object) -> object:
        compiled.append(graph)
        return graph.forward

    weight, right = torch.empty(64, 32, device="meta"), torch.empty(8, 32, device="meta")
    product = torch.compile(torch.ops.panda.product_with_low_rank, dynamic=True, backend=backend, fullgraph=True)
    for rows in (1024, 1536, 1600, 2048):
        x, left = torch.empty(2, rows, 64, device="meta"), torch.empty(2 * rows, 8, device="meta")
        assert product(x, weight, left, right).shape == (2, rows, 32)
    assert len(compiled) == 1
    assert get_triton_kernels_for_op("panda::product_with_low_rank") == [_multiply]  # so its source is part of the key


@pytest.mark.skipif(not ON_HOPPER, reason="no Hopper GPU")
@pytest.mark.parametrize("shape", [(2048, 64, 64, 4), (2048, 60, 64, 8)])
def test_what_it_cannot_do_well_is_left_to_cublas(shape: tuple[int, int, int, int]) -> None:
    from panda.models.adapters.low_rank_triton import can_multiply

    rows, depth, columns, rank = shape
    sizes = (rows, depth), (depth, columns), (rows, rank), (rank, columns)
    assert not can_multiply(*(torch.zeros(size, dtype=torch.bfloat16, device=DEVICE) for size in sizes))
