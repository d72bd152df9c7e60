"""NVLAMB's arithmetic on a GPU, in fp32, in the fewest passes over memory: one before the norms are known, one after.

It computes the same as ``layerwise_torch``, which is easier to read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl

from panda.registry.contexts import TensorLayout

CHUNK = 8192
"""Elements that one program of the grid handles, all of one segment."""
BLOCK = 2048
"""Elements that a program handles at once."""
CHUNKS_AT_ONCE = 256


def replace_gradients(layouts: list[TensorLayout], states: list[dict[str, Any]], group: dict[str, Any]) -> torch.Tensor:
    """As ``layerwise_torch.replace_gradients``."""
    beta1, beta2 = group["betas"]
    squares = []
    for layout, state in zip(layouts, states, strict=True):
        tensor, chunks = layout.tensor, _chunks(layout)
        step = state["step"] + 1
        partial = torch.empty(2, chunks.count, dtype=torch.float32, device=tensor.device)
        squares.append(torch.empty(len(layout.segments), 2, dtype=torch.float64, device=tensor.device))
        if not layout.segments:
            continue
        _update[(chunks.count,)](
            tensor,
            tensor.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            chunks.starts,
            chunks.lengths,
            partial,
            beta1,
            1 - beta1,  # from double: 1 - float(0.999) is off by 5e-5
            beta2,
            1 - beta2,
            1 / (1 - beta1**step),
            (1 - beta2**step) ** -0.5,
            group["eps"],
            group["weight_decay"],
            aligned=chunks.aligned,
            chunk_size=CHUNK,
            block=BLOCK,
        )
        _sum_chunks[(len(layout.segments), 2)](
            partial, chunks.first_of_segment, squares[-1], chunks.count, block=CHUNKS_AT_ONCE
        )
    return torch.cat(squares)


def move(layouts: list[TensorLayout], rate: float, factors: torch.Tensor) -> None:
    """As ``layerwise_torch.move``."""
    factors = factors.float()
    for layout, own in zip(
        layouts, torch.split_with_sizes(factors, [len(layout.segments) for layout in layouts]), strict=True
    ):
        chunks = _chunks(layout)
        if layout.segments:
            _move[(chunks.count,)](
                layout.tensor,
                layout.tensor.grad,
                chunks.starts,
                chunks.lengths,
                chunks.segments,
                own,
                rate,
                aligned=chunks.aligned,
                chunk_size=CHUNK,
                block=BLOCK,
            )


@dataclass(frozen=True)
class _Chunks:
    """The segments of a tensor, cut into chunks for the programs of a grid; int64 on the device."""

    count: int
    aligned: bool
    """Whether every chunk can be loaded 16 bytes at a time."""
    starts: torch.Tensor
    """[count]: index of the first element in the tensor."""
    lengths: torch.Tensor
    """[count]"""
    segments: torch.Tensor
    """[count]: index of the segment that it belongs to."""
    first_of_segment: torch.Tensor
    """[segments + 1]: first chunk of each segment, and the number of chunks."""


_made: WeakKeyDictionary[TensorLayout, _Chunks] = WeakKeyDictionary()


def _chunks(layout: TensorLayout) -> _Chunks:
    if layout not in _made:
        starts, lengths, segments, first = [], [], [], [0]
        for number, segment in enumerate(layout.segments):
            for begin in range(0, segment.length, CHUNK):
                starts.append(segment.start + begin)
                lengths.append(min(CHUNK, segment.length - begin))
                segments.append(number)
            first.append(len(starts))
        aligned = all(number % 4 == 0 for number in (*starts, *lengths))
        _made[layout] = _Chunks(
            len(starts),
            aligned,
            *(layout.tensor.new_tensor(each, dtype=torch.int64) for each in (starts, lengths, segments, first)),
        )
    return _made[layout]


@triton.jit
def _update(
    weights,
    gradients,
    first_moments,
    second_moments,
    starts,
    lengths,
    squares,
    beta1,
    beta1_rest,
    beta2,
    beta2_rest,
    correction1,
    correction2,
    eps,
    decay,
    aligned: tl.constexpr,
    chunk_size: tl.constexpr,
    block: tl.constexpr,
):
    chunk = tl.program_id(0)
    start, length = tl.load(starts + chunk), tl.load(lengths + chunk)
    if aligned:
        start, length = tl.multiple_of(start, 4), tl.multiple_of(length, 4)
    weight_squares = tl.zeros((block,), tl.float32)
    update_squares = tl.zeros((block,), tl.float32)
    for begin in range(0, chunk_size, block):
        offset = begin + tl.arange(0, block)
        inside = offset < length
        at = start + offset
        w = tl.load(weights + at, inside, 0.0)
        g = tl.load(gradients + at, inside, 0.0)
        m = beta1 * tl.load(first_moments + at, inside, 0.0) + beta1_rest * g
        v = beta2 * tl.load(second_moments + at, inside, 0.0) + beta2_rest * g * g
        u = tl.div_rn(m * correction1, tl.sqrt_rn(v) * correction2 + eps) + decay * w
        tl.store(first_moments + at, m, inside)
        tl.store(second_moments + at, v, inside)
        tl.store(gradients + at, u, inside)
        weight_squares += w * w
        update_squares += tl.where(inside, u * u, 0.0)
    tl.store(squares + chunk, tl.sum(weight_squares))
    tl.store(squares + tl.num_programs(0) + chunk, tl.sum(update_squares))


@triton.jit
def _sum_chunks(partial, first_of_segment, squares, count, block: tl.constexpr):
    # In a fixed order, not in that in which programs end, so that the bits are the same each time.
    segment, side = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(first_of_segment + segment), tl.load(first_of_segment + segment + 1)
    total = tl.zeros((block,), tl.float64)
    for begin in range(first, end, block):
        at = begin + tl.arange(0, block)
        total += tl.load(partial + side * count + at, at < end, 0.0).to(tl.float64)
    tl.store(squares + 2 * segment + side, tl.sum(total))


@triton.jit
def _move(
    weights,
    updates,
    starts,
    lengths,
    segments,
    factors,
    rate,
    aligned: tl.constexpr,
    chunk_size: tl.constexpr,
    block: tl.constexpr,
):
    chunk = tl.program_id(0)
    start, length = tl.load(starts + chunk), tl.load(lengths + chunk)
    if aligned:
        start, length = tl.multiple_of(start, 4), tl.multiple_of(length, 4)
    factor = rate * tl.load(factors + tl.load(segments + chunk))
    for begin in range(0, chunk_size, block):
        offset = begin + tl.arange(0, block)
        inside = offset < length
        at = start + offset
        w = tl.load(weights + at, inside, 0.0)
        tl.store(weights + at, w - factor * tl.load(updates + at, inside, 0.0), inside)
        tl.store(updates + at, tl.zeros((block,), tl.float32), inside)
