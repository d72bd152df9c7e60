"""A run whose checkpoints are damaged goes on from the newest that is whole, or begins again, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import losses

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.processes import Processes
from panda.registry import UserError
from panda.runner import train

RUN = (
    *("--arch", "llama-tiny", "--num_layers", "1", "--hidden_size", "16", "--intermediate_size", "24"),
    *("--num_heads", "2", "--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", "32"),
    *("--gradient_accumulation_steps", "1", "--num_workers", "0", "--max_steps", "3", "--save_steps", "1"),
    *("-p", "no:plot", "-p", "no:tensorboard", "--prompts", "a", "--learning_rate", "1e-3"),
)


def run_again(*argv: str) -> None:
    assert train(configure(parse_arguments(list(argv)))) is not None


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.glob("*step*"))


def test_damaged_checkpoints_are_set_aside(
    processes: Processes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, checkpoints = tmp_path / "run", tmp_path / "run/checkpoints"
    run_again(*RUN, "--output_dir", str(run))
    expected = losses(run)
    unfinished(run)
    flip(next((checkpoints / "step-00000003").glob("*model_states*")))
    (checkpoints / "step-00000002/manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"step-00000003: the checkpoint is damaged: mp_rank_00_model_states.pt"):
        run_again("--resume", str(checkpoints / "step-00000003"))
    assert names(checkpoints) == ["step-00000001", "step-00000002", "step-00000003"]
    capsys.readouterr()

    run_again("--resume", str(run))
    said = capsys.readouterr().out
    assert (
        f"set aside: {checkpoints}/damaged-1-step-00000003, since {checkpoints}/step-00000003: the checkpoint" in said
    )
    assert f"set aside: {checkpoints}/damaged-1-step-00000002, since it is damaged: manifest.json has another" in said
    assert losses(run) == expected
    kept = ["step-00000001", "step-00000002", "step-00000003"]
    assert names(checkpoints) == ["damaged-1-step-00000002", "damaged-1-step-00000003", *kept]


def test_where_all_are_damaged_the_run_begins_again_or_stops_as_asked(
    processes: Processes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, checkpoints = tmp_path / "run", tmp_path / "run/checkpoints"
    run_again(*RUN, "--output_dir", str(run))
    expected = losses(run)
    unfinished(run)
    flip(next((checkpoints / "step-00000003").glob("random-*")))
    for step in (1, 2):
        (checkpoints / f"step-0000000{step}/manifest.json").write_bytes(b"\0" * 99)
    auto = [*RUN, "--resume", "auto", "--output_dir", str(run)]
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"all of its checkpoints are damaged: step-00000001, .*`if_damaged: begin`"
        ):
            run_again(*auto, "--if_damaged", "stop")
    capsys.readouterr()
    run_again(*auto)
    assert f"{run}: none of its checkpoints is whole: the run begins again, from its first" in capsys.readouterr().out
    assert losses(run) == expected
    kept = ["step-00000001", "step-00000002", "step-00000003"]
    assert names(checkpoints) == [*(f"damaged-1-{name}" for name in kept), *kept]


def unfinished(run: Path) -> None:
    """Make ``run`` one that was killed before its end was recorded."""
    described = json.loads((run / "provenance.json").read_text())
    del described["end"]
    (run / "provenance.json").write_text(json.dumps(described))
