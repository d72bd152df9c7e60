"""A run and an export that earlier versions wrote are read; those of later formats are refused as such."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import exported_weights
from launching import losses
from launching import metrics
from written_run import ROWS
from written_run import STEPS

from panda.cli import export as export_command
from panda.cli.main import main
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.checkpoints.weights import checkpoint_weights
from panda.engine.processes import Processes
from panda.registry import UserError
from panda.runner import train
from panda.weights.run_folders import exported_model

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


@pytest.mark.parametrize("command", ["export", "generate", "chat", "eval", "push", "plot", "report", "diff", "replay"])
def test_commands_refuse_runs_and_exports_of_later_formats(
    run: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run those that read it; of an export those that read weights of others."""
    more = {"generate": ["--prompt", "a"], "push": ["a/b", "--dry_run"], "diff": [str(run)], "replay": ["1"]}
    later = json.loads((run / "provenance.json").read_text()) | {"format": 2}
    (run / "provenance.json").write_text(json.dumps(later))
    assert main([command, str(run), *more.get(command, [])]) == 2
    assert "written by a later version of panda, in format 2" in capsys.readouterr().err
    (run / "provenance.json").unlink()
    (run / "export/panda.json").write_text('{"format": 2}')
    if command in ("generate", "chat", "push"):
        assert main([command, str(run / "export"), *more.get(command, [])]) == 2
        assert "exported by a later version of panda, in format 2" in capsys.readouterr().err


def test_an_export_is_known_to_be_older_whatever_the_times_of_its_files(
    processes: Processes, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def renewed(steps: int, *more: str) -> None:
        data = ("--instruction_tuning_data_dir", str(ROWS))
        train(configure(parse_arguments(["--resume", str(run), "--max_steps", str(steps), *data, *more])))

    assert exported_model(run) == run / "export", "it says nothing of its checkpoint: by the times"
    renewed(STEPS + 1)
    newest, export = run / f"checkpoints/step-{STEPS + 1:08d}/manifest.json", run / "export"
    os.utime(newest, (2**31, 2**31))
    assert exported_model(run) == export, "a copy may have any times"
    before = shutil.copytree(export, run / "before")
    renewed(STEPS + 2)
    shutil.rmtree(export)
    shutil.copytree(before, export)  # as if the run had been killed before it exported
    for times in ((0, 0), (2**31, 2**31)):
        for file in export.iterdir():
            os.utime(file, times)
        with pytest.raises(UserError, match=f"older than its newest checkpoint, step-{STEPS + 2:08d}"):
            exported_model(run)
    assert main(["export", str(run)]) == 0
    assert exported_model(run) == export

    written = export_command._write

    def saving(*given: Any) -> None:
        shutil.copytree(newest.parent, run / f"checkpoints/step-{STEPS + 9:08d}")
        written(*given)

    monkeypatch.setattr(export_command, "_write", saving)
    assert main(["export", str(run)]) == 0
    with pytest.raises(UserError, match=f"older than its newest checkpoint, step-{STEPS + 9:08d}"):
        exported_model(run)  # the run has saved since the export chose its checkpoint


def test_later_formats_are_refused_as_such(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "export/panda.json").write_text('{"format": 2}')
    assert main(["generate", str(run / "export"), "--prompt", "a"]) == 2
    assert "exported by a later version of panda, in format 2" in capsys.readouterr().err
    described = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(json.dumps(described | {"format": 2}))
    with pytest.raises(UserError, match="written by a later version of panda, in format 2"):
        train(configure(parse_arguments(["--resume", str(run), "--instruction_tuning_data_dir", str(ROWS)])))
