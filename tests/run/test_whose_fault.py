"""An exception in the code of a task's author says whose it is, and at which row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from panda.testing import train

TASKS = '''
"""Tasks and an optimizer with faults."""

from dataclasses import dataclass

import torch
from panda import register_optimizer, register_task
from panda.registry.contexts import Loss
from panda.tasks.instruct import Instruct, InstructOptions


@register_task("unparsed", options=InstructOptions)
class Unparsed(Instruct):
    """A row of letters is expected."""

    def parse(self, row):
        return super().parse(row) if row.fields["input"].isalpha() else row.fields["input"] + 1


@register_task("uncollated", options=InstructOptions)
class Uncollated(Instruct):
    """Batches cannot be made."""

    def collate(self, rows, shape):
        raise IndexError("too many indices")


RETURNED = {
    "a_number": lambda loss: float(loss),
    "a_vector": lambda loss: loss.expand(3),
    "no_gradient": lambda loss: loss.detach(),
    "no_pair": lambda loss: Loss(loss, {"mine": 1.0}),
    "a_vector_of_metrics": lambda loss: Loss(loss, {"mine": (loss.detach().expand(2), 1)}),
    "none": lambda loss: None,
}


@dataclass(frozen=True)
class LosslessOptions(InstructOptions):
    how: str = ""
    """What it returns."""


@register_task("lossless", options=LosslessOptions)
class Lossless(Instruct):
    """Its loss is none."""

    def __init__(self, options, context):
        super().__init__(options, context)
        self.how = options.how

    def loss(self, model, batch):
        return RETURNED[self.how](super().loss(model, batch))


@register_task("unbatched", options=InstructOptions)
class Unbatched(Instruct):
    """Its batches are none."""

    def collate(self, rows, shape):
        return {"input_ids": []}


class Unsteady(torch.optim.SGD):
    def step(self, closure=None):
        return {}["momentum"]


class Unreadable(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["shape"] = {"of": Unreadable}


@register_optimizer("unreadable")
def unreadable(options, context):
    """Its state cannot be read again."""
    return Unreadable(context.param_groups)


@register_optimizer("unsteady")
def unsteady(options, context):
    """DeepSpeed calls its step."""
    return Unsteady(context.param_groups)
'''


@pytest.mark.parametrize(
    ("named", "workers", "said"),
    [
        ({"task": "unparsed"}, 0, ["`parse` was given rows/a.jsonl, row 3. UnusableRowError leaves a row out."]),
        ({"task": "uncollated"}, 0, ["This came out of `collate` of task 'uncollated', ", "tasks.py:"]),
        ({"task": "uncollated"}, 2, ["This came out of `collate` of task 'uncollated', ", "tasks.py:"]),
        ({"task": "unbatched"}, 0, ["task: `collate` returned a dict, and not a `Batch`", "a fault of ", "tasks.py:"]),
        (
            {"task": "lossless", "how": "a_number"},
            0,
            ["task: `loss` returned ", ", and not a tensor. Return ", "a fault of "],
        ),
        (
            {"task": "lossless", "how": "a_vector"},
            0,
            ["task: `loss` returned a tensor of the shape [3], and not a sum. Return "],
        ),
        (
            {"task": "lossless", "how": "no_gradient"},
            0,
            ["task: `loss` returned a tensor without a gradient: nothing would be trained"],
        ),
        (
            {"task": "lossless", "how": "no_pair"},
            0,
            ["task: the metric 'mine' of its `loss` is 1.0, and not a numerator and a"],
        ),
        (
            {"task": "lossless", "how": "a_vector_of_metrics"},
            0,
            ["task: the metric 'mine' of its `loss` is (tensor([", "a fault of "],
        ),
        ({"task": "lossless", "how": "none"}, 0, ["task: `loss` returned None, and not a tensor."]),
        (
            {"optimizer": "unreadable"},
            0,
            ["optimizer: its state holds more than tensors, numbers and texts", "tasks.py:"],
        ),
        ({"optimizer": "unsteady"}, 0, ["This came out of `Unsteady.step` of optimizer 'unsteady', ", "tasks.py:"]),
    ],
)
def test_an_exception_of_an_author_says_where_it_was(
    named: dict[str, str], workers: int, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("rows", "own"):
        (tmp_path / folder).mkdir()
    rows = [{"input": text, "target": "x"} for text in ("a", "b", "3", "d")]
    (tmp_path / "rows" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own" / "tasks.py").write_text(TASKS)
    sizes = {"num_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "max_seq_length": 16}
    data = {"instruction_tuning_data_dir": "rows", "user_dir": "own", "num_workers": workers, "max_steps": 1}
    printed = train(tmp_path / "run", fails=True, arch="llama-tiny", **sizes, **data, **named).printed
    for each in said:
        assert each in printed
