"""Trained weights whose gradient is zero are named, once, and nothing else is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from panda.run.unreached import STEPS
from panda.run.unreached import Unreached


class Model(torch.nn.Module):
    """An adapter, whose first half has no gradient in the first step, and what ``loses`` names."""

    def __init__(self, loses: str) -> None:
        super().__init__()
        self.loses = loses
        self.base = torch.nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.first = torch.nn.Linear(4, 2, bias=False)
        self.second = torch.nn.Linear(2, 4, bias=False)
        self.other = torch.nn.Linear(4, 4, bias=False)
        torch.nn.init.zeros_(self.second.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.base(x) + self.second(self.first(x))
        if self.loses == "unused":
            return x
        return x + (self.other(x).detach() if self.loses == "detached" else self.other(x) * float(self.loses != "zero"))


def trained(loses: str, steps: int, rank: int = 0, compiles: bool = False) -> Unreached:
    torch.manual_seed(0)
    model = Model(loses)
    run: Any = SimpleNamespace(engine=SimpleNamespace(module=model), processes=SimpleNamespace(rank=rank))
    unreached = Unreached(run)
    forward: Any = torch.compile(model, backend="aot_eager") if compiles else model
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], 0.1)
    for _ in range(steps):
        forward(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        unreached.after_step()
    return unreached


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("loses", ["unused", "detached", "zero"])
def test_a_weight_without_a_gradient_is_named(loses: str, compiles: bool, capsys: pytest.CaptureFixture[str]) -> None:
    unreached = trained(loses, STEPS + 3, compiles=compiles)
    said = (
        "note: 1 of 3 trained weights had no gradient in the first 3 steps, and may not be trained at all: other.weight"
    )
    assert capsys.readouterr().out == f"{said}\n"
    assert not unreached.handles


def test_nothing_is_said_where_all_have_one(capsys: pytest.CaptureFixture[str]) -> None:
    trained("nothing", STEPS + 3)
    trained("unused", STEPS - 1)  # a run of fewer steps is not judged
    trained("unused", STEPS, rank=1)
    assert capsys.readouterr().out == ""
