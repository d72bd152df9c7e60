"""No command is silent while it loads torch and reads data."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from panda.cli.main import main


@pytest.mark.parametrize("command", ["data", "prepare", "estimate"])
def test_a_command_says_that_it_loads_torch(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    @contextmanager
    def activity(what: str, *args: object, **kwargs: object) -> Iterator[None]:
        said.append(what)
        yield

    monkeypatch.setattr(importlib.import_module(f"panda.cli.{command}"), "activity", activity)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text('[{"input": "Spell om.", "target": "o-m"}]')
    assert main([command, "--arch", "llama-tiny", "--instruction_tuning_data_dir", "rows.json"]) == 0
    assert said and said[0] == "loading torch"
