"""Trained weights whose gradient is zero are named, once, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import train_many

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


def take(weight: torch.Tensor) -> None:
    """As DeepSpeed does with bf16 in stage 1."""
    weight.grad = None


def trained(loses: str, steps: int, rank: int = 0, compiles: bool = False, taken: bool = False) -> Unreached:
    torch.manual_seed(0)
    model = Model(loses)
    if taken:
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(take)
        torch.nn.init.normal_(model.second.weight)  # it is not trained here
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
    trained("nothing", STEPS + 3, taken=True)
    trained("nothing", STEPS + 3, taken=True, compiles=True)
    trained("unused", STEPS - 1)  # a run of fewer steps is not judged
    trained("unused", STEPS, rank=1)
    assert capsys.readouterr().out == ""


def test_no_engine_hides_gradients_from_it(tmp_path: Path) -> None:
    """DeepSpeed takes each gradient away as soon as it is there, and each of its optimizers in a way of its own."""
    rows = [{"input": "x" * (index % 9 + 1), "target": "y"} for index in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    shape = "--arch llama-tiny --num_layers 2 --hidden_size 32 --intermediate_size 48 --num_heads 4"
    common = f"--task instruct --instruction_tuning_data_dir rows.json {shape} --num_key_value_heads 2"
    ways = [f"--precision bf16 --zero_stage {stage}" for stage in range(4)]
    ways += [f"{ways[1]} --use_lora", f"{ways[3]} --use_lora", "--zero_stage 2"]
    steps = ["--max_steps", STEPS + 1]
    runs = [[*common.split(), *way.split(), *steps, "--output_dir", number] for number, way in enumerate(ways)]
    said = train_many(runs, ranks=2, cwd=tmp_path)
    assert said.count(f"step {STEPS + 1}/{STEPS + 1}") == len(ways)
    assert "had no gradient" not in said
