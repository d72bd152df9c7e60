"""Help: of every command, asked in each way, within 80 columns; and what a command says that is given nothing."""

from __future__ import annotations

import importlib

import pytest

from panda.cli.main import COMMANDS
from panda.cli.main import main
from panda.registry.catalog import catalog_with
from panda.registry.kinds import KINDS

WITHOUT_ARGUMENTS = {"list": 0, "doctor": 0, "runs": 2, "train": 2}
"""Commands that need none: `runs` reads runs/, which is missing here, and `train` could be named by flags alone."""


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def helped(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `panda WORDS` prints. It must end with 0."""
    try:
        code = main(words)
    except SystemExit as ended:  # argparse's
        code = int(ended.code or 0)
    said = capsys.readouterr()
    assert (code, said.err) == (0, "")
    return said.out


@pytest.mark.parametrize("command", ["", *COMMANDS, "delta make", "delta apply"])
def test_help_fits_80_columns_and_is_that_of_panda_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = helped([*command.split(), "--help"], capsys)
    assert text.startswith("usage: panda")
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert helped(["help", *command.split()], capsys) == text


@pytest.mark.parametrize("kind", KINDS)
def test_help_of_components_fits_80_columns(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    for offer in catalog_with(None).offers(kind):
        text = helped(["train", f"--{'plugins' if kind == 'plugin' else kind}", offer.name, "--help"], capsys)
        assert [line for line in text.splitlines() if len(line) > 80] == [], offer.name


def test_usage_fits_where_a_mistake_is_followed_by_it(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        usage = getattr(importlib.import_module(f"panda.cli.{command}"), "USAGE", "")
        assert [line for line in usage.splitlines() if len(line) > 78] == [], command  # two columns in


@pytest.mark.parametrize("command", [each for each in COMMANDS if each not in WITHOUT_ARGUMENTS])
def test_a_command_without_what_it_needs_ends_with_2_and_its_usage(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ")
    assert f"\n  usage: panda {command} " in said.err
    assert said.err.endswith(f"\n  `panda {command} --help` explains it.\n")
    assert len(said.err.splitlines()) < 12  # the mistake is not above a page of help


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("runs --sort ages", "--sort: 'ages' is none of age, loss, eval, run. Did you mean 'age'?"),
        ("runs --jsn", "'--jsn' is not expected here. Did you mean '--json'?"),
        ("runs --jsn=1", "'--jsn=1' is not expected here. Did you mean '--json'?"),
        ("delta mak", "command: 'mak' is none of make, apply. Did you mean 'make'?"),
        (
            "delta make --target a",
            "the following arguments are required: --base/--base_model/--base-model-path, --output",
        ),
        ("list -p acme", "-p: -p acme: expected `-p no:NAME`. To add a plugin, write `--plugins NAME`."),
        ("eval", "no model is given."),
    ],
)
def test_mistakes_that_argparse_finds_are_said_as_others(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}\n  usage: panda {line.split()[0]}")


def test_help_of_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["help", "generat"], "'generat'. Did you mean 'generate'?"),
        (["hlep"], "'hlep'. Did you mean 'help'?"),
    ):
        assert main(words) == 2
        assert f"unknown command {said}" in capsys.readouterr().err


def test_lists_fit_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for kind in KINDS:
        assert main(["list", kind]) == 0
        assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 79] == []
