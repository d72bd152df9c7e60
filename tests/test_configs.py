"""Every configuration that panda ships trains, and its resolved form runs again as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import losses
from launching import run_panda

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_trains(config: Path, tmp_path: Path) -> None:
    done = run_panda("panda-train", "--config", config, "--max_steps", 4, "--run_name", "first", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first = tmp_path / "runs" / "first"
    for name in ("config.yaml", "provenance.json", "deepspeed.json", "metrics.jsonl", "loss.png", "answers.json"):
        assert (first / name).stat().st_size > 0, name
        assert name in done.stdout or name in ("deepspeed.json", "answers.json")
    assert list((first / "tensorboard").iterdir()) and (first / "export" / "config.json").exists()
    assert losses(first)[-1] < losses(first)[0]

    again = run_panda("panda-train", "--config", first / "config.yaml", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "runs" / "first-2") == losses(first)
    assert (tmp_path / "runs/first-2/config.yaml").read_text() == (first / "config.yaml").read_text()
