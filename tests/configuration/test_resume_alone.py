"""`--resume RUN`, where nothing names a model, reads the configuration that the run recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from panda.configuration.arguments import arguments_of
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.registry import UserError

RECORDED = "recorded_by: 0.1.0\narch: llama-tiny\nhidden_size: 32\nlearning_rate: 0.5\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run/checkpoints/step-00000003").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text(RECORDED)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize(
    "argv",
    [
        "--resume run",
        "--resume run/",
        "--resume ./run/checkpoints",
        "--resume run/checkpoints/step-00000003",
        "--resume auto --output_dir run",
        "--resume=run --learning_rate 0.25",
        "--resume run --output_dir new",
    ],
)
def test_the_run_is_the_configuration(run: Path, argv: str) -> None:
    resolved = configure(parse_arguments(argv.split())).resolved
    rate = resolved.settings["learning_rate"]
    assert resolved.settings["hidden_size"].value == 32
    changed = "0.25" in argv
    assert (rate.value, rate.origin) == ((0.25, "--learning_rate") if changed else (0.5, f"{run}/config.yaml:4"))


def test_from_inside_of_a_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "checkpoints")
    assert parse_arguments(["--resume", "step-00000003"]).given["hidden_size"].text == "32"
    assert arguments_of(None, {"resume": "."}).given["hidden_size"].text == "32"


@pytest.mark.parametrize(
    "argv",
    [
        "--resume run --arch llama-tiny",
        "--resume run --model llama",
        "--resume run --ckpt_path somewhere",
        "--resume elsewhere --arch llama-tiny",
        "--output_dir run --arch llama-tiny",
        "--resume auto --arch llama-tiny",
    ],
)
def test_where_the_command_line_names_a_model_it_is_all_there_is(run: Path, argv: str) -> None:
    assert "hidden_size" not in parse_arguments(argv.split()).given


def test_what_a_run_names_in_files_of_the_user_is_executed_only_where_the_command_line_names_it(run: Path) -> None:
    """Whatever the file says of itself: the user has not named it."""
    (run / "config.yaml").write_text("arch: llama-tiny\nplugins: ./mine.py:shout\n")
    with pytest.raises(UserError, match=r"only where the command line names them: add `--plugins ./mine.py:shout`"):
        configure(parse_arguments(["--resume", "run"]))
