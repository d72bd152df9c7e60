"""plugins/panda-preference as other users get it: built, installed outside this environment, used by name."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from launching import metrics
from launching import run_panda
from launching import start
from plugin_site import PLUGINS
from plugin_site import SCRIPTS
from plugin_site import install
from plugin_site import run

ROOT = Path(__file__).parents[1]
NAME = "panda-preference"
MODULES = sorted((PLUGINS / NAME / "panda_preference").rglob("*.py"))
TASKS = ("distill", "dpo", "kto", "orpo", "reward", "simpo")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the plugin's wheel is installed in."""
    return install(NAME, tmp_path_factory.mktemp("plugin"))


def test_lists_and_shows_it(site: Path, tmp_path: Path) -> None:
    listed = run(SCRIPTS / "panda", "list", "tasks", cwd=tmp_path, site=site).stdout
    assert {line.split()[0] for line in listed.splitlines() if f"{NAME} " in line} == set(TASKS)
    for task in TASKS:
        shown = run(SCRIPTS / "panda", "show", "task", task, cwd=tmp_path, site=site)
        assert shown.returncode == 0 and str(site / "panda_preference") in shown.stdout, shown.stdout + shown.stderr


@pytest.fixture(scope="module")
def tested(site: Path, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The output of the plugin's own tests, which start runs as a user does."""
    folder = tmp_path_factory.mktemp("tested")
    options = ("-q", "-p", "no:cacheprovider", "--basetemp", folder / "base")
    own = (SCRIPTS / "pytest", *options, site.parent / "source" / "tests")
    with start(*own, cwd=folder, serving=True, PYTHONPATH=str(site)) as run:
        return run.wait(1800)


def test_its_own_tests_pass_where_it_is_installed(tested: subprocess.CompletedProcess[str]) -> None:
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize("task", TASKS)
def test_its_configuration_trains(task: str, site: Path, tmp_path: Path) -> None:
    config = ROOT / "configs" / f"{task}-tiny.yaml"
    few = ("--max_steps", 6, "--output_dir", tmp_path / "run", "-p", "no:plot", "-p", "no:tensorboard")
    done = run_panda("panda-train", "--config", config, *few, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [record["loss"] for record in metrics(tmp_path / "run") if "loss" in record]
    assert len(steps) == 6 and steps[-1] < steps[0]
    assert any("eval_loss" in record for record in metrics(tmp_path / "run"))
    assert (tmp_path / "run" / "export").is_dir()
    # The sample is named inside the package, wherever that is.
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert str(resolved.get("preference_data_dir", "panda_preference:")).startswith("panda_preference:")


def promised() -> set[str]:
    """The names in the table of docs/plugins.md: of modules as a whole, and of what is listed of others."""
    text = (ROOT / "docs" / "plugins.md").read_text().partition("## What you may rely on")[2]
    found: set[str] = set()
    for module, listed in re.findall(r"`(panda(?:\.\w+)+)`(?: \(([^)]*)\))?", text):
        names = re.findall(r"`(\w+)`", listed)
        found |= {f"{module}.{name}" for name in names} or {module}
    return found


@pytest.mark.parametrize(
    "module", sorted((PLUGINS / NAME / "panda_preference").rglob("*.py")), ids=lambda path: path.stem
)
def test_it_uses_only_what_is_promised(module: Path) -> None:
    """Anywhere in its modules, also inside functions and for the type checker."""
    used = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            used |= {f"{node.module}.{alias.name}" for alias in node.names}
    of_panda = {name for name in used if name.split(".")[0] == "panda"}
    private = {name for name in of_panda if name not in promised() and name.rpartition(".")[0] not in promised()}
    assert not private, f"docs/plugins.md does not promise {', '.join(sorted(private))}"
