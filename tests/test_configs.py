"""Every configuration that panda ships trains, and its resolved form can be run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launching import losses

from panda.cli.train import main

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_trains(
    config: Path, processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--config", str(config), "--max_steps", "4", "--run_name", "first"]) == 0, capsys.readouterr().err
    first, printed = Path("runs/first"), capsys.readouterr().out
    for name in ("config.yaml", "provenance.json", "deepspeed.json", "metrics.jsonl", "loss.png", "answers.json"):
        assert (first / name).stat().st_size > 0, name
        assert name in printed
    assert list((first / "tensorboard").iterdir()) and (first / "export" / "config.json").exists()
    assert losses(first)[-1] < losses(first)[0]

    assert main(["--config", str(first / "config.yaml")]) == 0, capsys.readouterr().err
    assert losses(Path("runs/first-2")) == losses(first)
    assert Path("runs/first-2/config.yaml").read_text() == (first / "config.yaml").read_text()
