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


WITH_EMA = RECORDED + "plugins: [ema]\nema_decay: 0.5\n"


@pytest.mark.parametrize("argv", ["--plugins profile", "-p no:ema"])
def test_keys_of_a_plugin_that_the_command_line_replaces_are_left_out_and_named(run: Path, argv: str) -> None:
    (run / "config.yaml").write_text(WITH_EMA)
    resolved = configure(parse_arguments(["--resume", "run", *argv.split()])).resolved
    assert "ema_decay" not in resolved.settings and resolved.settings["hidden_size"].value == 32
    (warning,) = resolved.warnings
    assert warning.startswith(f"{run}/config.yaml:6: `ema_decay: 0.5` is left out")


def test_other_keys_that_nothing_takes_are_errors(run: Path) -> None:
    (run / "config.yaml").write_text(WITH_EMA.replace("[ema]", "[]"))
    for argv in (["--resume", "run"], ["--resume", "run", "--learning_rate", "0.25"]):
        with pytest.raises(UserError, match="'ema_decay' is known, but nothing that this run chose uses it"):
            configure(parse_arguments(argv))
    (run / "config.yaml").write_text(WITH_EMA)
    with pytest.raises(UserError, match="--ema_decay: 'ema_decay' is known, but nothing"):
        configure(parse_arguments(["--resume", "run", "--plugins", "profile", "--ema_decay", "0.9"]))
    (run / "own.yaml").write_text(WITH_EMA.replace("recorded_by: 0.1.0\n", ""))
    with pytest.raises(UserError, match=r"own.yaml:5: 'ema_decay' is known, but nothing"):
        configure(parse_arguments(["--config", "run/own.yaml", "--plugins", "profile"]))


def test_auto_with_the_config_of_a_run_continues_that_run(tmp_path: Path) -> None:
    run = tmp_path / "anywhere"
    run.mkdir()
    config = run / "config.yaml"
    config.write_text("arch: llama-tiny\n")
    words = ["--config", str(config), "--resume", "auto"]
    assert "output_dir" not in parse_arguments(words).given, "it is no run"
    (run / "provenance.json").touch()
    assert parse_arguments(words).given["output_dir"].value == str(run)
    assert parse_arguments([*words, "--output_dir", "other"]).given["output_dir"].value == "other"
    assert "output_dir" not in parse_arguments(words[:2]).given
