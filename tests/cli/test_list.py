from __future__ import annotations

import json

import pytest
from distributions import Distributions

from panda.cli.main import main
from panda.registry.hooks import HOOKS
from panda.registry.kinds import KINDS

MODULES = {
    "acme.tiny": "@register_model('tiny')\ndef build(options, context):\n    '''Tiny model.'''\nraise SystemExit",
    "acme.watch": "raise SystemExit",
}


@pytest.fixture
def acme(distributions: Distributions) -> Distributions:
    site = distributions.install(
        "acme-panda", {"models": {"tiny": "acme.tiny"}, "plugins": {"watch": "acme.watch"}}, MODULES, version="2.5"
    )
    watch = site / "acme" / "watch.py"
    watch.write_text('"""Watches."""\n' + watch.read_text())
    return distributions


def lines(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    assert main(["list", *argv]) == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_everything_is_listed_by_kind_and_nothing_is_imported(
    acme: Distributions, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = lines(capsys)
    assert [line.partition(":")[0] for line in listed if ": " in line and line.partition(":")[0].isidentifier()] == [
        *(kind.plural for kind in KINDS.values()),
        "metrics",
    ]
    assert "tiny acme-panda 2.5 Tiny model." in listed
    assert "watch acme-panda 2.5 Watches." in listed
    assert any(line.startswith("llama-65b panda-train ") for line in listed)
    assert acme.imported() == set()


@pytest.mark.parametrize("kind", ["model", "models"])
def test_a_kind_is_named_in_singular_or_plural(
    acme: Distributions, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    listed = lines(capsys, kind)
    assert "tiny acme-panda 2.5 Tiny model." in listed
    assert not any("adamw" in line for line in listed)
    assert lines(capsys, "lr-schedulers") == lines(capsys, "lr_scheduler")


def test_json_is_one_array(acme: Distributions, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[-1] == {
        "kind": "model",
        "name": "tiny",
        "distribution": "acme-panda",
        "version": "2.5",
        "module": "acme.tiny",
        "summary": "Tiny model.",
        "line": 6,
    }


def test_summaries_of_very_many_packages_are_left_to_json(
    acme: Distributions, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("panda.registry.offers.SOURCES_READ", 1)
    listed = lines(capsys)
    assert listed[-1] == "Descriptions of 2 components of other packages are left out; `--json` shows all."
    assert "tiny acme-panda 2.5" in listed and "watch acme-panda 2.5" in listed
    assert any(line.startswith("cosine panda-train ") and line.endswith(".") for line in listed), "panda's own are read"
    assert "tiny acme-panda 2.5 Tiny model." in lines(capsys, "models"), "one module"
    assert main(["list", "--json"]) == 0
    assert "Watches." in capsys.readouterr().out


def test_what_is_blocked_is_not_listed(acme: Distributions, capsys: pytest.CaptureFixture[str]) -> None:
    assert not any("acme" in line for line in lines(capsys, "-p", "no:acme-panda"))
    assert main(["list", "-p", "acme-panda"]) == 2
    assert "expected `-p no:NAME`" in capsys.readouterr().err


def test_an_unknown_kind_is_told_the_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "nonsense"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown kind 'nonsense'. The kinds are: tasks, models, archs,")
    assert main(["list", "optimisers"]) == 2
    assert "Did you mean 'optimizers'?" in capsys.readouterr().err


def test_an_unknown_command_is_told_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lst"]) == 2
    error = capsys.readouterr().err
    assert error == "error: unknown command 'lst'. Did you mean 'list'? `panda --help` lists the commands.\n"
    for argv in ([], ["--help"]):
        assert main(argv) == 0
        assert capsys.readouterr().out.startswith("usage: panda COMMAND")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("panda ")


def test_hooks_are_listed_with_ranks_and_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    listed = lines(capsys, "hooks")
    assert listed[0].startswith("hooks: what a plugin implements")
    assert "panda_step_end(run, step) every rank Optimizer step ``step`` (counted from 1) is done" in listed
    for begin in ("panda_exception(run, error) those that see it ", "panda_log(run, record) rank 0 A log record of"):
        assert any(line.startswith(begin) for line in listed)
    assert len(listed) - 1 == len(HOOKS)
    assert main(["list", "hook", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == set(HOOKS) and all(row["summary"] for row in rows)
