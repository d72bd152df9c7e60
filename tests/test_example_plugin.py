"""plugins/panda-example as other users get it: built, installed outside this environment, used by name.

These processes know it only by a folder on PYTHONPATH with the content of its wheel.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import start
from plugin_site import SCRIPTS
from plugin_site import install
from plugin_site import run

SMALL_RUN = (
    *("--arch", "gru-tiny", "--optimizer", "lion", "--plugins", "report"),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", "64", "--num_workers", "0"),
    *("--max_steps", "2", "--per_gpu_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the plugin's wheel is installed in."""
    return install("panda-example", tmp_path_factory.mktemp("plugin"))


def test_lists_and_shows_it(site: Path, tmp_path: Path) -> None:
    listed = run(SCRIPTS / "panda", "list", "--json", cwd=tmp_path, site=site)
    rows = json.loads(listed.stdout)
    mine = {(row["kind"], row["name"]) for row in rows if row["distribution"] == "panda-example"}
    assert mine == {
        ("model", "gru"),
        ("arch", "gru-small"),
        ("arch", "gru-tiny"),
        ("optimizer", "lion"),
        ("plugin", "report"),
    }
    assert all(row["summary"] for row in rows if row["distribution"] == "panda-example")
    models = run(SCRIPTS / "panda", "list", "models", cwd=tmp_path, site=site).stdout
    assert "gru" in models and "panda-example 0.1.0" in models
    for kind, name in mine:
        shown = run(SCRIPTS / "panda", "show", kind, name, cwd=tmp_path, site=site)
        assert shown.returncode == 0, shown.stderr
        assert str(site / "panda_example") in shown.stdout, "not from where it was installed"


@pytest.fixture(scope="module")
def tested(site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The output of the plugin's own tests, which start runs as a user does, and a run that they trained."""
    folder = tmp_path_factory.mktemp("tested")
    options = ("-q", "-p", "no:cacheprovider", "--basetemp", folder / "base")
    tests = site.parent / "source" / "tests"
    with start(SCRIPTS / "pytest", *options, tests, cwd=folder, serving=True, PYTHONPATH=str(site)) as started:
        return started.wait(1800), folder / "base" / "runs0" / "one"


def test_its_own_tests_pass_where_it_is_installed(tested: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    assert tested[0].returncode == 0, tested[0].stdout + tested[0].stderr


def test_trains_by_name(site: Path, tested: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    components = json.loads((tested[1] / "provenance.json").read_text())["components"]
    for label in ("model gru", "arch gru-tiny", "optimizer lion", "plugin report"):
        assert components[label]["distribution"] == "panda-example"
        assert components[label]["source"].startswith(str(site))
    assert "| run | complete |" in (tested[1] / "report.md").read_text()


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--arch", "gru-tiny"), "arch 'gru-tiny'"),
        (("--arch", "llama-tiny", "--optimizer", "lion"), "optimizer 'lion'"),
    ],
)
def test_a_blocked_plugin_provides_no_names(site: Path, tmp_path: Path, flags: tuple[str, ...], name: str) -> None:
    data = ("--instruction_tuning_data_dir", "panda:data/sample/instruct")
    blocked = run(SCRIPTS / "panda-train", *data, *flags, "-p", "no:panda-example", cwd=tmp_path, site=site)
    assert blocked.returncode == 2
    assert f"{name} is provided by panda-example 0.1.0" in blocked.stderr


def test_names_are_unknown_without_the_plugin(tmp_path: Path) -> None:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('panda_example') is not None)"
    if run(sys.executable, "-c", code, cwd=tmp_path).returncode:
        pytest.skip("panda-example is installed in this environment")
    done = run(SCRIPTS / "panda-train", *SMALL_RUN, "--output_dir", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown optimizer 'lion'" in done.stderr or "unknown arch 'gru-tiny'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    shown = run(SCRIPTS / "panda", "show", "model", "gru", cwd=tmp_path)
    assert shown.returncode == 2
    assert "unknown model 'gru'" in shown.stderr
