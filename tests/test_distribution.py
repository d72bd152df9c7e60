"""What is built for a package index is whole: the wheel works in an empty folder, and the sdist has the tests."""

from __future__ import annotations

import email
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest

from panda.cli.main import COMMANDS
from panda.cli.main import main

ROOT = Path(__file__).parents[1]
LEFT_OUT = ("build", "dist", "runs", "*.egg-info", "__pycache__", ".git", ".venv", ".*_cache", ".hypothesis", ".whl")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(what: str, source: Path, folder: Path) -> Path:
    command = [sys.executable, "-c", BUILD, f"build_{what}", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel, built of the sdist, and what the sdist holds."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    with tarfile.open(build("sdist", folder / "source", folder)) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    wheel = build("wheel", unpacked, folder)
    shutil.rmtree(unpacked / "build", ignore_errors=True)
    return wheel, unpacked


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_sdist_has_every_file_of_the_source(built: tuple[Path, Path]) -> None:
    _, unpacked = built
    source = unpacked.parents[1] / "source"
    missing = files(source) - files(unpacked) - {".gitignore"}
    assert {name for name in missing if ".egg-info" not in name} == set()
    for copied in ("configs", "example"):
        assert files(source / "panda" / copied) == files(unpacked / "panda" / copied) != set()


def test_the_wheel_has_the_configurations_and_the_example_and_no_tests(built: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(built[0]).namelist())
    assert {f"panda/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= names
    example = ROOT / "plugins" / "panda-example"
    tracked = {name for name in files(example) if not re.search(r"__pycache__|\.egg-info|^build/|/\.|^\.", name)}
    assert {f"panda/example/{name}" for name in tracked} <= names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "panda").rglob("*.py")}
    assert sources <= names and "panda/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"panda", next(n.split("/")[0] for n in names if "dist-info" in n)}


def test_the_metadata_has_what_an_index_shows(built: tuple[Path, Path]) -> None:
    wheel = zipfile.ZipFile(built[0])
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["License-Expression"] == "Apache-2.0" and metadata.get_all("License-File") == ["LICENSE"]
    assert metadata.get_all("Project-URL") and len(metadata.get_all("Classifier") or []) > 5
    assert not any(line.startswith("License ::") for line in metadata.get_all("Classifier") or [])
    description = metadata.get_payload()
    assert isinstance(description, str) and "# panda" in description and "<!--" not in description
    targets = re.findall(r"\]\(([^)]+)\)", description)
    assert [target for target in targets if "://" not in target] == []


def test_links_of_the_readme_are_absolute_where_the_repository_is_known() -> None:
    module = runpy.run_path(str(ROOT / "setup.py"))
    text = (
        "<!-- ci: x -->\n[docs](docs/), [p](docs/plugins.md#a-kind), [`x`](https://a.b), [docs/data.md](docs/data.md)"
    )
    made = module["long_description"](text, "https://host/panda")
    assert made == (
        "[docs](https://host/panda/tree/main/docs/), [p](https://host/panda/blob/main/docs/plugins.md#a-kind),"
        " [`x`](https://a.b), [docs/data.md](https://host/panda/blob/main/docs/data.md)"
    )
    made = module["long_description"](text, "")
    assert made == "`docs`, p (`docs/plugins.md#a-kind`), [`x`](https://a.b), `docs/data.md`"
    assert all(url.startswith("https://host/panda") for url in module["project_urls"]("https://host/panda").values())


def test_the_wheel_works_in_an_empty_folder(built: tuple[Path, Path], tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    zipfile.ZipFile(built[0]).extractall(site)
    empty.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}

    def run(module: str, *argv: str) -> str:
        code = f"import sys, panda; print(panda.__file__); from panda.cli.{module} import main; sys.exit(main())"
        command = [sys.executable, "-c", code, *argv]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        where, _, rest = done.stdout.partition("\n")
        assert where.startswith(str(site))
        return rest

    version = built[0].name.split("-")[1]
    for module, flag in (("train", "--version"), ("train", "-V"), ("main", "--version")):
        assert run(module, flag) == f"panda {version}\n"
    assert "--gradient_accumulation_steps" in run("train", "--config", "panda:configs/instruct-tiny.yaml", "--help")
    shown = run("main", "show", "arch", "llama-tiny")
    assert f"panda-train {version}" in shown
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_help_name_configurations_that_come_with_panda(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with suppress(SystemExit):  # argparse exits after it has printed
        main([command, "--help"])
    text = capsys.readouterr().out
    named = re.findall(r"[\w:./-]+\.ya?ml", text.partition("example")[2])
    assert [name for name in named if command != "translate" and not name.startswith("panda:")] == []
    for name in named:
        if name.startswith("panda:"):
            assert (ROOT / "panda" / name.removeprefix("panda:")).is_file()
