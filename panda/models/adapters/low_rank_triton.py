"""A matrix product and one of low rank, summed in float32 and rounded once, on a GPU of NVIDIA's Hopper generation.

cuBLAS (CUDA 13.0, 2026-11) rounds a product to 16 bits before it adds a 16-bit matrix to it. Here the product of low
rank continues the sum of the other one, before anything is rounded or written. On an H100, over the six products of a
LLaMA-7B's shapes, that takes 3 % less than both products of cuBLAS, and 13 % less than a float32 product to which
another kernel adds (bench/LOG.md).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from panda.models.adapters.one_rounding import ALIGNMENT

ROWS, COLUMNS, DEPTH = 128, 256, 64
"""The tile of the result that a program computes at once, and what it reads of both factors at a time."""
IN_THE_INTERPRETER = 4
"""How many programs share the tiles there: on a GPU one for each multiprocessor."""
TILES_IN_A_GROUP = 8
"""Rows of tiles that are computed after one another, so that factors are read from the cache."""


def can_multiply(x: Tensor, weight: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether `product_with_low_rank` can be called."""
    return (
        x.is_cuda and is_hopper(x.device) and all(_is_aligned(_by_rows(matrix)) for matrix in (x, weight, left, right))
    )


def is_hopper(device: torch.device) -> bool:
    return _multiprocessors_of_hopper(device) > 0


@cache
def _multiprocessors_of_hopper(device: torch.device) -> int:
    """How many of them ``device`` has; 0 for a GPU of another generation. Asked once: it is called 14 times a layer."""
    found = torch.cuda.get_device_properties(device)
    # AMD's MI200 and MI300 are 9.0 and 9.4 to torch.
    return found.multi_processor_count if found.major == 9 and torch.version.hip is None else 0


def product_with_low_rank(x: Tensor, weight: Tensor, left: Tensor, right: Tensor, result: Tensor) -> None:
    """Set ``result`` [..., columns], which is contiguous, to ``x @ weight + left @ right``, rounded once.

    ``x`` is [..., m], ``weight`` [m, columns], ``left`` [rows, r] and ``right`` [r, columns]; all of one 16-bit type.
    Each, or its transpose, is contiguous, ``x`` itself is, and both right factors are so in the same way.
    """
    # For the descriptors that the kernel makes. A setting of this thread's, which inductor sets at each launch, too.
    triton.set_allocator(_scratch)
    _multiply[(_programs(x),)](x, weight, left, right, result, **_sizes(x, weight, left, right))


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _programs(x: Tensor) -> int:
    return _multiprocessors_of_hopper(x.device) if x.is_cuda else IN_THE_INTERPRETER


def _sizes(x: Tensor, weight: Tensor, left: Tensor, right: Tensor) -> dict[str, Any]:
    # Not `len`, which would make torch compile code for each number of rows.
    return {
        **{"rows": left.shape[0], "columns": weight.shape[1], "depth": weight.shape[0], "rank": left.shape[1]},
        "transposed": not weight.is_contiguous(),
        **{"tile_rows": ROWS, "tile_columns": COLUMNS, "tile_depth": DEPTH},
        "rank_depth": min(DEPTH, max(16, triton.next_power_of_2(left.shape[1]))),
        **{"group": TILES_IN_A_GROUP, "programs": _programs(x)},
        **{"num_warps": 8, "num_stages": 3},
    }


def _by_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.is_contiguous() else matrix.t()


def _is_aligned(matrix: Tensor) -> bool:
    row = matrix.shape[1] * matrix.element_size()
    return matrix.is_contiguous() and matrix.data_ptr() % ALIGNMENT == 0 and row % ALIGNMENT == 0


@triton.jit
def _multiply(
    x,
    weight,
    left,
    right,
    result,
    rows,
    columns,
    depth,
    rank,
    transposed: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_depth: tl.constexpr,
    rank_depth: tl.constexpr,
    group: tl.constexpr,
    programs: tl.constexpr,
):
    rows = tl.cast(rows, tl.int32)  # places in a descriptor are; code for any shape may give 64 bits
    x = tl.make_tensor_descriptor(x, [rows, depth], [depth, 1], [tile_rows, tile_depth])
    left = tl.make_tensor_descriptor(left, [rows, rank], [rank, 1], [tile_rows, rank_depth])
    if transposed:
        weight = tl.make_tensor_descriptor(weight, [columns, depth], [depth, 1], [tile_columns, tile_depth])
        right = tl.make_tensor_descriptor(right, [columns, rank], [rank, 1], [tile_columns, rank_depth])
    else:
        weight = tl.make_tensor_descriptor(weight, [depth, columns], [columns, 1], [tile_depth, tile_columns])
        right = tl.make_tensor_descriptor(right, [rank, columns], [columns, 1], [rank_depth, tile_columns])
    result = tl.make_tensor_descriptor(result, [rows, columns], [columns, 1], [tile_rows, tile_columns // 2])
    down, across = tl.cdiv(rows, tile_rows), tl.cdiv(columns, tile_columns)
    for tile in tl.range(tl.program_id(0), down * across, programs, warp_specialize=True):
        first = tile // (group * across) * group
        height = min(down - first, group)
        inside = tile % (group * across)
        row = (first + inside % height) * tile_rows
        column = inside // height * tile_columns
        total = tl.zeros((tile_rows, tile_columns), dtype=tl.float32)
        for at in range(0, depth, tile_depth):
            if transposed:
                total = tl.dot(x.load([row, at]), weight.load([column, at]).T, total)
            else:
                total = tl.dot(x.load([row, at]), weight.load([at, column]), total)
        for at in range(0, rank, rank_depth):
            if transposed:
                total = tl.dot(left.load([row, at]), right.load([column, at]).T, total)
            else:
                total = tl.dot(left.load([row, at]), right.load([at, column]), total)
        # In two halves, which need half the shared memory.
        halves = tl.permute(tl.reshape(total, (tile_rows, 2, tile_columns // 2)), (0, 2, 1))
        one, other = tl.split(halves)
        result.store([row, column], one.to(result.dtype))
        result.store([row, column + tile_columns // 2], other.to(result.dtype))


@torch.library.triton_op("panda::product_with_low_rank", mutates_args={})
def _launched_by_compiled_code(x: Tensor, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """As `product_with_low_rank`, in code that inductor compiles. Nothing is checked when that runs.

    torch looks for `wrap_triton` and the kernel when it reads this definition, so that its caches know the kernel's
    source.
    """
    result = x.new_empty((*x.shape[:-1], weight.shape[1]))
    sizes = _sizes(x, weight, left, right)
    wrap_triton(_multiply)[(_programs(x),)](x, weight, left, right, result, **sizes)
    return result
