"""Whole parameters come together from any parts, and go back to where the parts are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Barrier
from threading import Thread
from typing import Any

import pytest
import torch

from panda.engine.exchange import RankExchange
from panda.engine.exchange import Segments
from panda.engine.processes import Processes
from panda.registry.contexts import ParameterDescription
from panda.registry.contexts import Segment
from panda.registry.contexts import TensorLayout

SHAPES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "rows": ((6, 5), 0),
    "columns": ((3, 4), 1),
    "experts": ((2, 4, 6), 2),
    "whole": ((7, 3), None),
    "vector": ((5,), None),
}
"""Whole shapes, and the dimension that tensor-parallel ranks split."""
GROUPS = (("rows", "columns"), ("whole", "experts", "vector"))
PADDING = float("nan")


def whole(name: str) -> torch.Tensor:
    shape, _ = SHAPES[name]
    first = 1000.0 * list(SHAPES).index(name)
    return torch.arange(first, first + torch.Size(shape).numel()).view(shape)


def part(name: str, place: int, size: int) -> torch.Tensor:
    """Of a tensor-parallel rank, flat."""
    split = SHAPES[name][1]
    return (whole(name) if split is None else whole(name).chunk(size, split)[place]).reshape(-1)


def held_by(rank: int, size: int, data_ranks: int, *, partitioned: bool) -> tuple[list[TensorLayout], list[Any]]:
    """The tensors of a rank, one for each group, with padding after each parameter and at the end."""
    layouts, values = [], []
    for group in GROUPS:
        flat, segments = [], []
        at = 0
        for number, name in enumerate(group):
            elements = part(name, rank % size, size)
            flat += [elements, torch.tensor([PADDING])]
            segments.append((number, at, len(elements)))
            at += len(elements) + 1
        long = -(-at // data_ranks) if partitioned else at
        begin = rank // size * long if partitioned else 0
        values.append(torch.cat([*flat, torch.full((long * data_ranks - at,), PADDING)])[begin : begin + long])
        mine = []
        for number, start, length in segments:
            left, right = max(start, begin), min(start + length, begin + long)
            if left < right:
                mine.append(Segment(number, left - begin, right - left, left - start))
        layouts.append(TensorLayout(torch.zeros(long), group, tuple(mine)))
    return layouts, values


class Together:
    """all_to_all_single between threads."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.sent = Barrier(ranks, timeout=20), [[torch.empty(0)] * ranks for _ in range(ranks)]
        self.elements = 0

    def of(self, rank: int) -> Any:
        def all_to_all_single(
            receiving: torch.Tensor, sending: torch.Tensor, received: list[int], sent: list[int]
        ) -> None:
            self.sent[rank] = list(sending.split(sent))
            self.barrier.wait()
            mine = [self.sent[other][rank] for other in range(len(self.sent))]
            assert [len(each) for each in mine] == received
            receiving.copy_(torch.cat(mine))
            self.elements += sum(len(each) for other, each in enumerate(mine) if other != rank)
            self.barrier.wait()

        return all_to_all_single


@contextmanager
def ranks_of(data_ranks: int, size: int, *, partitioned: bool) -> Iterator[Any]:
    """Calls a function on each rank, in threads, with its exchange, layouts and values; returns what they return."""
    world = data_ranks * size
    held = [held_by(rank, size, data_ranks, partitioned=partitioned) for rank in range(world)]
    everyone: list[list[Segments]] = [
        [tuple((each.parameters[s.parameter], s.start, s.length, s.source) for s in each.segments) for each in layouts]
        for layouts, _ in held
    ]
    split = size > 1
    described = {
        name: ParameterDescription(name, shape, "matrix", dimension if split else None)
        for name, (shape, dimension) in SHAPES.items()
    }
    together = Together(world)

    def call(do: Any) -> list[Any]:
        results: list[Any] = [None] * world

        def on(rank: int) -> None:
            processes = Processes(rank, world, torch.device("cpu"), size)
            layouts, values = held[rank]
            made = RankExchange(layouts, described, everyone, processes, partitioned=partitioned)
            made._collective = together.of(rank)
            results[rank] = do(made, layouts, values)

        threads = [Thread(target=on, args=(rank,), daemon=True) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results

    call.together = together  # type: ignore[attr-defined]
    yield call


WORLDS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2)]


@pytest.mark.parametrize("partitioned", [True, False])
@pytest.mark.parametrize(("data_ranks", "size"), WORLDS)
def test_each_parameter_is_whole_on_one_rank(data_ranks: int, size: int, partitioned: bool) -> None:
    with ranks_of(data_ranks, size, partitioned=partitioned) as call:
        results = call(lambda made, layouts, values: made.gather(layouts, values, None))
    owned = [name for result in results for name in result]
    assert sorted(owned) == sorted(SHAPES)
    for result in results:
        for name, value in result.items():
            assert torch.equal(value, whole(name))
    if data_ranks * size > 1:
        assert sum(bool(result) for result in results) == min(len(SHAPES), data_ranks * size)


@pytest.mark.parametrize("partitioned", [True, False])
@pytest.mark.parametrize(("data_ranks", "size"), WORLDS)
def test_and_goes_back_to_every_rank_that_holds_a_part(data_ranks: int, size: int, partitioned: bool) -> None:
    def there_and_back(made: RankExchange, layouts: Any, values: Any) -> Any:
        wholes = {name: -value for name, value in made.gather(layouts, values, None).items()}
        return layouts, values, made.scatter(layouts, wholes, None, None)

    with ranks_of(data_ranks, size, partitioned=partitioned) as call:
        for layouts, values, returned in call(there_and_back):
            for layout, value, back in zip(layouts, values, returned, strict=True):
                expected = torch.zeros_like(value)
                for segment in layout.segments:
                    at = slice(segment.start, segment.start + segment.length)
                    expected[at] = -value[at]
                assert torch.equal(back, expected) and back.shape == layout.tensor.shape
                assert back.dtype == torch.float32


@pytest.mark.parametrize("partitioned", [True, False])
def test_only_what_is_named_is_moved_and_in_the_type_that_is_asked_for(partitioned: bool) -> None:
    names = ("whole", "columns")

    def there_and_back(made: RankExchange, layouts: Any, values: Any) -> Any:
        halves = [value.bfloat16() for value in values]
        wholes = made.gather(layouts[:1], halves[:1], names) | made.gather(layouts[1:], halves[1:], names)
        return wholes, layouts, made.scatter(layouts[1:], wholes, names, torch.bfloat16)

    with ranks_of(2, 1, partitioned=partitioned) as call:
        results = call(there_and_back)
    assert sorted(name for wholes, *_ in results for name in wholes) == sorted(names)
    for _, layouts, (back,) in results:
        assert back.dtype == torch.bfloat16
        for segment in layouts[1].segments:
            named = layouts[1].parameters[segment.parameter] in names
            assert bool(back[segment.start : segment.start + segment.length].any()) == named


def test_what_is_sent_is_each_element_once_there_and_once_back() -> None:
    def there_and_back(made: RankExchange, layouts: Any, values: Any) -> None:
        made.scatter(layouts, made.gather(layouts, values, None), None, None)

    elements = sum(whole(name).numel() for name in SHAPES)
    for partitioned in (True, False):
        with ranks_of(3, 1, partitioned=partitioned) as call:
            call(there_and_back)
        sent = call.together.elements
        # Of partitioned ones, less what the owner has itself; of others, one whole for each of the other two ranks.
        assert elements < sent < 2 * elements if partitioned else sent == 2 * elements
        with ranks_of(1, 2, partitioned=partitioned) as call:
            call(there_and_back)
        halves = sum(whole(name).numel() for name, (_, split) in SHAPES.items() if split is not None) // 2
        others = elements - 2 * halves
        assert call.together.elements == 2 * halves + others  # what both have goes to no owner, and back to one


def test_ranks_have_about_the_same_work() -> None:
    layouts = [TensorLayout(torch.zeros(0), tuple("abcde"), ())]
    shapes = {"a": (8, 8), "b": (4, 16), "c": (8, 8), "d": (2, 2), "e": (2, 4, 8)}
    described = {name: ParameterDescription(name, shape, "matrix") for name, shape in shapes.items()}
    processes = Processes(0, 2, torch.device("cpu"))
    made = RankExchange(layouts, described, [[()], [()]], processes, partitioned=True)
    owners = made._owners(tuple(shapes))
    work = {name: torch.Size(shape).numel() * min(shape[-2:]) for name, shape in shapes.items()}
    assert sorted(sum(work[n] for n in shapes if owners[n] == rank) for rank in (0, 1)) == [768, 776]
