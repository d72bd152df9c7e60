from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from panda.configuration.arguments import parse_arguments
from panda.registry import UserError


def values(*argv: str) -> dict[str, object]:
    return {key: given.value for key, given in parse_arguments(list(argv)).given.items()}


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_arguments(list(argv))
    return str(caught.value)


def test_flags_take_a_word_an_equals_sign_several_words_or_none() -> None:
    assert values("--a", "1", "--b=2", "--c", "x", "y", "--d", "--e", "-1", "--f=", "--g=--h") == {
        "a": "1",
        "b": "2",
        "c": ("x", "y"),
        "d": True,
        "e": "-1",
        "f": "",
        "g": "--h",
    }


def test_a_flag_is_written_with_dashes_or_underscores_and_keeps_its_spelling_as_origin() -> None:
    given = parse_arguments(["--learning-rate", "1e-4", "--max_steps", "2"]).given
    assert [given[key].origin for key in ("learning_rate", "max_steps")] == ["--learning-rate", "--max_steps"]
    assert given["learning_rate"].text == "1e-4"


def test_a_flag_that_is_given_twice_is_refused() -> None:
    assert refused("--learning_rate", "1", "--learning-rate", "2") == "--learning-rate is given twice."


@pytest.mark.parametrize("word", ["--", "--=3", "-x", "word"])
def test_a_word_that_is_no_flag_is_refused(word: str) -> None:
    assert refused("--a=1", word) == f"{word!r}: expected a flag, --key value."


def test_a_yaml_file_without_its_flag_is_told_the_flag() -> None:
    assert refused("run.yaml").endswith("Did you mean `--config run.yaml`?")


def test_blocked_names_are_read_wherever_they_stand() -> None:
    arguments = parse_arguments(
        ["-p", "no:plot", "--plugins", "a", "b", "-p", "no:acme", "-p=no:bolt", "--c", "x", "-p=no:d"]
    )
    assert arguments.blocked == ("plot", "acme", "bolt", "d")
    assert arguments.given["plugins"].value == ("a", "b", "no:plot", "no:acme", "no:bolt", "no:d")
    assert arguments.given["c"].value == "x"


def test_profile_is_short_for_one_more_plugin(tmp_path: Path) -> None:
    assert parse_arguments(["--profile"]).given["plugins"].value == ("profile",)
    (tmp_path / "run.yaml").write_text("plugins: [a, b]")
    argv = ["--config", str(tmp_path / "run.yaml"), "--profile", "-p", "no:plot"]
    assert parse_arguments(argv).given["plugins"].value == ("a", "b", "profile", "no:plot")
    (tmp_path / "run.yaml").write_text("plugins: [a, 'no:plot']\n")  # as a run with `-p no:plot` records it
    assert parse_arguments([*argv, "-p", "no:plot"]).given["plugins"].value == ("a", "no:plot", "profile")


@pytest.mark.parametrize("argv", [["-p"], ["-p", "plot"], ["-p", "no:"], ["-p="]])
def test_p_without_no_is_refused(argv: list[str]) -> None:
    assert "expected `-p no:NAME`" in refused(*argv)


@pytest.mark.parametrize("argv", [["-h"], ["--help"], ["--plugins", "a", "-h"], ["--seed", "--help"]])
def test_help_is_seen_wherever_it_stands(argv: list[str]) -> None:
    assert parse_arguments(argv).help
    assert not parse_arguments(argv[:-1]).help


def test_what_launchers_add_is_ignored() -> None:
    assert values("--local_rank=0", "--local-rank=1") == {}


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 1\nmax_steps: 2\n")
    for flag in ("--config", "--conf_path", "--conf-path"):
        given = parse_arguments([flag, str(file), "--seed", "3"]).given
        assert {key: (entry.value, entry.origin) for key, entry in given.items()} == {
            "seed": ("3", "--seed"),
            "max_steps": ("2", f"{file}:2"),
        }


@pytest.mark.parametrize("argv", [["--config"], ["--config", "a", "b"]])
def test_config_without_one_path_is_refused(argv: list[str]) -> None:
    assert refused(*argv).startswith("--config needs the path of a YAML file")


def test_a_configuration_cannot_name_another(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 1\nconf_path: other.yaml\n")
    assert refused("--config", str(file)) == f"{file}:2: a configuration file cannot name another one."


def test_the_documents_misspelling_is_taken_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert values("--learing_rate", "2e-3") == {"learning_rate": "2e-3"}
    captured = capsys.readouterr()
    assert captured.err == "warning: --learing_rate: 'learing_rate' is taken as 'learning_rate'.\n"
    assert captured.out == ""
    file = tmp_path / "run.yaml"
    file.write_text("learing_rate: 1\n")
    assert values("--config", str(file), "--learning_rate", "2") == {"learning_rate": "2"}
    assert f"{file}:1" in capsys.readouterr().err


def test_both_spellings_at_once_are_refused() -> None:
    assert "'learning_rate' is given twice" in refused("--learing_rate", "1", "--learning_rate", "2")


def test_a_pipe_that_closes_early_is_no_traceback_and_no_success() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "panda.cli.main", "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(600) == 141
