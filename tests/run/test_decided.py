"""What a run decides for itself is decided once: a resumed run keeps the day of its start, and how it saves memory."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizer_zoo import folder_of

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.registry import UserError
from panda.run import decided
from panda.run.preparation import Preparation
from panda.runner import train

TINY = "--arch llama-tiny --num_layers 1 --hidden_size 16 --intermediate_size 16 --num_heads 1 --num_workers 0"
SHORT = "--gradient_accumulation_steps 1 --max_seq_length 256 --per_gpu_train_batch_size 4 --save_steps 1 --prompts a"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"input": letter, "target": letter} for letter in "abcd"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    shutil.copytree(folder_of("llama3", "llama3.2"), tmp_path / "tokenizer")
    return tmp_path


def arguments(*more: str) -> list[str]:
    data = ["--tokenizer", "tokenizer", "--instruction_tuning_data_dir", "rows.json", "--output_dir", "run"]
    return [*TINY.split(), *SHORT.split(), *data, *more]


def on_day(monkeypatch: pytest.MonkeyPatch, day: int) -> None:
    class Day(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2024, 2, day, tzinfo=tz)

    monkeypatch.setattr(decided, "datetime", Day)


def test_a_run_that_is_resumed_on_another_day_keeps_its_date(
    processes: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_day(monkeypatch, 3)
    first = train(configure(parse_arguments(arguments("--max_steps", "1"))))
    assert first is not None
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["template_date"] == "2024-02-03"
    on_day(monkeypatch, 4)
    for resume in ("auto", "run"):  # refused where the data differs
        steps = "2" if resume == "auto" else "3"
        resumed = train(configure(parse_arguments(arguments("--max_steps", steps, "--resume", resume))))
        assert resumed is not None and resumed.dataset.fingerprint == first.dataset.fingerprint
    text = (folder / "run" / "export" / "chat_template.jinja").read_text()
    assert "03 Feb 2024" in text and "04 Feb 2024" not in text
    again = Preparation(configure(parse_arguments(["--config", "run/config.yaml", "--output_dir", "again"])))
    assert again.dataset.fingerprint == first.dataset.fingerprint
    new = ["other" if word == "run" else word for word in arguments()]
    other = Preparation(configure(parse_arguments(new)))
    assert other.dataset.fingerprint != first.dataset.fingerprint


def test_the_date_can_be_given_and_is_checked(folder: Path) -> None:
    (folder / "run.yaml").write_text("template_date: 2023-01-02\n")  # which YAML itself reads as a date
    prepared = Preparation(configure(parse_arguments(["--config", "run.yaml", *arguments()])))
    assert "02 Jan 2023" in prepared.task.tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], tokenize=False
    )
    assert prepared.task.text_format() == "chat: the tokenizer's chat template, with the date 2023-01-02"
    with pytest.raises(UserError, match=r"template_date: '2023-13-02' is not a date\. Write YYYY-MM-DD"):
        configure(parse_arguments(arguments("--template_date", "2023-13-02")))


@pytest.mark.parametrize("text", ["", "[1]", "a: [", "template_date:"])
def test_a_damaged_configuration_has_no_date(folder: Path, text: str) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "provenance.json").write_text("{}")
    (folder / "run" / "config.yaml").write_text(text)
    resolved = configure(parse_arguments(arguments("--resume", "auto"))).resolved
    assert decided.recorded(resolved, "template_date") is None
    (folder / "run" / "config.yaml").write_text("template_date: '2024-02-03'")
    assert decided.recorded(resolved, "template_date") == "2024-02-03"
    (folder / "run" / "config.yaml").write_text("mix.template_date: 2024-02-03")
    assert decided.recorded(resolved, "template_date") == "2024-02-03"


def test_each_task_whose_template_can_carry_a_date_keeps_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only those of prompts and answers: preference learning has other rows, and the same templates."""
    on_day(monkeypatch, 3)
    (folder / "task.py").write_text(
        "from dataclasses import dataclass\n"
        "from panda import register_task\n"
        "from panda.tasks.dialogue_task import DialogueFormat\n"
        "from panda.tasks.instruct import Instruct\n\n\n"
        "@dataclass(frozen=True)\n"
        "class ToyOptions(DialogueFormat):\n"
        '    """Options of the toy."""\n\n\n'
        '@register_task("toy", options=ToyOptions)\n'
        "class Toy(Instruct):\n"
        '    """A toy."""\n'
    )
    words = [*TINY.split(), "--tokenizer", "tokenizer", "--task", "toy", "--user_dir", str(folder)]
    prepared = Preparation(configure(parse_arguments(words)))
    assert prepared.resolved.settings["template_date"].value == "2024-02-03"
