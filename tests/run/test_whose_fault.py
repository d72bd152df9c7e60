"""An exception in the code of a task's author says whose it is, and at which row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from panda.testing import train

TASKS = '''
"""Tasks and an optimizer with faults."""

import torch
from panda import register_optimizer, register_task
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


class Unsteady(torch.optim.SGD):
    def step(self, closure=None):
        return {}["momentum"]


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
