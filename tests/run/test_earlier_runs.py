"""A run and an export that earlier versions wrote are read; those of later formats are refused as such."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from launching import exported_weights
from launching import losses
from launching import metrics
from written_run import ROWS
from written_run import STEPS

from panda.cli.main import main
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.checkpoints.weights import checkpoint_weights
from panda.engine.processes import Processes
from panda.registry import UserError
from panda.runner import train

NEXT = [5.540313720703125, 5.612966060638428, 5.543093681335449]
"""The losses that followed in a run of the version that wrote the sample."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return shutil.copytree(Path(__file__).with_name("samples") / "run-1", tmp_path / "run")


def test_a_run_of_an_earlier_version_goes_on_as_it_did(processes: Processes, run: Path) -> None:
    weights = exported_weights(run)
    for name, stored in checkpoint_weights(run / f"checkpoints/step-{STEPS:08d}").items():
        assert torch.equal(stored.read(), weights[name]), name
    argv = ["--resume", str(run), "--max_steps", str(STEPS + len(NEXT)), "--instruction_tuning_data_dir", str(ROWS)]
    train(configure(parse_arguments(argv)))
    assert losses(run)[STEPS:] == pytest.approx(NEXT, rel=1e-5)
    assert json.loads((run / "provenance.json").read_text())["end"]["step"] == STEPS + len(NEXT)


def test_a_run_that_was_killed_while_it_removed_a_checkpoint_ends_without_traces(
    processes: Processes, run: Path
) -> None:
    """After its last step: nothing is saved any more, which would remove what is left, and nothing recorded twice."""
    described = json.loads((run / "provenance.json").read_text())
    del described["end"]
    (run / "provenance.json").write_text(json.dumps(described))
    (run / "checkpoints/.tmp-step-00000001").mkdir()
    before = metrics(run)
    train(configure(parse_arguments(["--resume", str(run), "--instruction_tuning_data_dir", str(ROWS)])))
    assert not (run / "checkpoints/.tmp-step-00000001").exists()
    assert metrics(run) == before and "eval_loss" in before[-1]
    assert json.loads((run / "provenance.json").read_text())["end"]["step"] == STEPS


def test_an_export_of_an_earlier_version_answers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [recorded] = json.loads((run / "answers.json").read_text())
    assert main(["generate", str(run / "export"), "--prompt", recorded["prompt"], "--max_new_tokens", "2"]) == 0
    said = capsys.readouterr().out
    (run / "export/panda.json").unlink()  # as of a version before 0.1.0
    assert main(["generate", str(run / "export"), "--prompt", recorded["prompt"], "--max_new_tokens", "2"]) == 0
    assert capsys.readouterr().out == said != ""


def test_later_formats_are_refused_as_such(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "export/panda.json").write_text('{"format": 2}')
    assert main(["generate", str(run / "export"), "--prompt", "a"]) == 2
    assert "exported by a later version of panda, in format 2" in capsys.readouterr().err
    described = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(json.dumps(described | {"format": 2}))
    with pytest.raises(UserError, match="written by a later version of panda, in format 2"):
        train(configure(parse_arguments(["--resume", str(run), "--instruction_tuning_data_dir", str(ROWS)])))
