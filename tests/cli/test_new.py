"""``panda new plugin``: what it makes installs, passes its own tests and trains at once."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from launching import EVERY_WAY
from plugin_site import run

from panda.cli import new
from panda.cli.main import main
from panda.registry.kinds import KINDS
from panda.testing.processes import start

ROOT = Path(__file__).parents[2]
TRIED = list(new.SUMMARIES) if EVERY_WAY else ["plugin"]
"""Each is installed, tested and trained. The tutorial, which a test follows, has a model and a task."""


def made(folder: Path, kind: str, patch: pytest.MonkeyPatch) -> Path:
    """The package `herons` with a component of ``kind``, in ``folder``."""
    patch.chdir(folder)
    assert main(["new", "plugin", "herons", "--kind", kind]) == 0
    return folder / "herons"


def test_there_is_a_template_for_each_kind_of_pandas_own() -> None:
    assert set(new.SUMMARIES) | {"kind"} == set(KINDS)
    assert {path.name for path in new.TEMPLATES.iterdir()} == set(new.SUMMARIES) | {"every"}


@pytest.mark.parametrize("kind", TRIED)
def test_it_installs_passes_its_tests_and_trains(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, site = made(tmp_path, kind, monkeypatch), tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps")
    installed = run(*pip, "--no-build-isolation", "--target", site, package, cwd=tmp_path)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    (package / "herons").rename(tmp_path / "hidden")  # its tests see only what was installed
    options = ("-q", "-n", "0", "-p", "no:cacheprovider", "--basetemp", tmp_path / "base")
    with start("pytest", *options, package, cwd=tmp_path, serving=True, PYTHONPATH=str(site)) as own:
        tested = own.wait()
    assert tested.returncode == 0, tested.stdout + tested.stderr
    config = ("--config", "herons/configs/herons.yaml", "-p", "no:plot", "-p", "no:tensorboard")
    with start("panda.cli.train", *config, cwd=tmp_path, PYTHONPATH=str(site)) as training:
        trained = training.wait()
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "herons" in trained.stdout


def test_the_tests_of_several_packages_run_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = made(tmp_path, "arch", monkeypatch), tmp_path / "egrets"
    assert main(["new", "plugin", "egrets", "--kind", "reader"]) == 0
    places = f"{first}{os.pathsep}{second}"
    with start("pytest", "--collect-only", "-q", "-n", "0", first, second, cwd=tmp_path, PYTHONPATH=places) as started:
        ended = started.wait()
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("kind", new.SUMMARIES)
def test_it_is_exemplary(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No placeholder is left, every file is short, and tools find nothing."""
    package = made(tmp_path, kind, monkeypatch)
    files = [path for path in package.rglob("*") if path.is_file()]
    assert len(files) <= 10
    for path in files:
        text = path.read_text()
        assert "@NAME" not in text and not {f"@{name}@" for name in new.names_of("bitterns", kind)} & set(text.split())
        assert len(text.splitlines()) <= 80, path
        if path.suffix == ".py":
            compile(text, path, "exec")
    described = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert described["name"] == "herons" and all(
        group[6:] in f"{kind}s archs api" for group in described["entry-points"]
    )
    for command in (["check"], ["format", "--check"]):
        arguments = [*command, "--config", ROOT / "pyproject.toml", "."]
        done = subprocess.run([sys.executable, "-m", "ruff", *arguments], cwd=package, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


BAD = {
    "class": "is a word of Python's own",
    "match": "is a word of Python's own",
    "json": "is a module of Python's own library",
    "1herons": "has to begin with a letter",
    "two herons": "has to begin with a letter",
    "../herons": "has to begin with a letter",
    "a--b": "has to begin with a letter",
    "panda-class": "its component would be called 'class'",
    "panda-train": "is installed here",
    "PyYAML": "is installed here",
    "panda": "the module 'panda' is there already, at",
    "adamw": "its optimizer would be called 'adamw', which is panda's own",
    "panda-nvlamb": "its optimizer would be called 'nvlamb', which is panda's own",
}


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_no_package_can_have_is_refused_with_the_reason(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "plugin", name, "--kind", "optimizer"]) == 2
    assert BAD[name] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "herons").symlink_to(tmp_path / "nowhere")
    assert main(["new", "plugin", "herons"]) == 2
    assert "herons: exists already, and nothing is overwritten" in capsys.readouterr().err
    assert main(["new", "plugin", "bitterns", "--kind", "modell"]) == 2
    assert "--kind: 'modell' is none of task, model, arch" in capsys.readouterr().err


def test_names_are_made_of_the_packages(tmp_path: Path) -> None:
    names = new.names_of("Panda_Grey.Herons", "model")
    assert (names["NAME"], names["PACKAGE"]) == ("panda-grey-herons", "panda_grey_herons")
    assert (names["COMPONENT"], names["IDENTIFIER"], names["CLASS"]) == ("grey-herons", "grey_herons", "GreyHerons")
    assert importlib.util.find_spec(names["PACKAGE"]) is None
