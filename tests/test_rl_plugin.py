"""plugins/panda-rl as other users get it: built, installed outside this environment, used by name.

These processes know it only by a folder on PYTHONPATH with the content of its wheel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import metrics
from launching import run_panda
from launching import start
from plugin_site import SCRIPTS
from plugin_site import install
from plugin_site import run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the plugin's wheel is installed in."""
    return install("panda-rl", tmp_path_factory.mktemp("plugin"))


def test_lists_and_shows_it(site: Path, tmp_path: Path) -> None:
    listed = run(SCRIPTS / "panda", "list", "--json", cwd=tmp_path, site=site)
    rows = [row for row in json.loads(listed.stdout) if row["distribution"] == "panda-rl"]
    names = {(row["kind"], row["name"]) for row in rows}
    rewards = {("reward", name) for name in ("last-number", "pattern", "length")}
    assert names == {("task", "grpo"), ("kind", "reward")} | rewards
    assert all(row["summary"] for row in rows)
    shown = run(SCRIPTS / "panda", "list", "rewards", cwd=tmp_path, site=site).stdout
    assert shown.startswith("rewards: What a completion is worth") and "last-number" in shown
    for kind, name in names:
        shown = run(SCRIPTS / "panda", "show", kind, name, cwd=tmp_path, site=site).stdout
        assert str(site / "panda_rl") in shown, "not from where it was installed"


def test_its_configuration_learns(site: Path, tmp_path: Path) -> None:
    """With a quarter of its completions a step, and so larger steps, it takes seconds."""
    fewer = ("--per_gpu_train_batch_size", 8, "--num_generations", 16, "--learning_rate", "3e-3", "--max_steps", 16)
    run = ("--logging_steps", 1, "--output_dir", tmp_path / "run", "-p", "no:plot", "-p", "no:tensorboard")
    config = ROOT / "configs" / "grpo-tiny.yaml"
    done = run_panda("panda-train", "--config", config, *fewer, *run, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stdout + done.stderr
    rewards = [record["reward"] for record in metrics(tmp_path / "run")]
    assert sum(rewards[:4]) / 4 < 0.02
    assert sum(rewards[-6:]) / 6 > 0.08


PROMISED_ONLY = """
import builtins, importlib, pkgutil, sys

promised, original = set(sys.argv[1:]), builtins.__import__

def checked(name, globals=None, locals=None, fromlist=(), level=0):
    if globals and globals.get("__name__", "").startswith("panda_rl") and name.split(".")[0] == "panda":
        for each in fromlist or ("",):
            if not {name, f"{name}.{each}"} & promised:
                raise ImportError(f"{globals['__name__']} imports {name}.{each}, which is private")
    return original(name, globals, locals, fromlist, level)

builtins.__import__ = checked
import panda_rl
for module in pkgutil.iter_modules(panda_rl.__path__):
    importlib.import_module(f"panda_rl.{module.name}")
from panda_rl.grpo import Grpo, GrpoOptions
print("imported")
"""


def test_it_imports_with_pandas_private_modules_hidden(site: Path, tmp_path: Path) -> None:
    """Imports in functions are seen by tests/test_documents.py, which reads the sources."""
    guide = (ROOT / "docs" / "plugins.md").read_text().partition("\n## What you may rely on\n")[2]
    promised = re.findall(r"`(panda(?:\.\w+)+)`", guide)
    done = run(sys.executable, "-c", PROMISED_ONLY, *promised, cwd=tmp_path, site=site)
    assert done.stdout == "imported\n", done.stderr
    fewer = [name for name in promised if name != "panda.tasks.dialogue_task"]
    done = run(sys.executable, "-c", PROMISED_ONLY, *fewer, cwd=tmp_path, site=site)
    assert "panda_rl.grpo imports panda.tasks.dialogue_task.DialogueTask, which is private" in done.stderr


def test_its_own_tests_pass_where_it_is_installed(site: Path, tmp_path: Path) -> None:
    options = ("-q", "-n", "0", "-p", "no:cacheprovider", "--basetemp", tmp_path / "base")
    with start(
        *(SCRIPTS / "pytest", *options, site.parent / "source" / "tests"),
        cwd=tmp_path,
        serving=True,
        PYTHONPATH=str(site),
    ) as own:
        done: subprocess.CompletedProcess[str] = own.wait(1800)
    assert done.returncode == 0, done.stdout + done.stderr


def test_names_are_unknown_without_it(tmp_path: Path) -> None:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('panda_rl') is not None)"
    if run(sys.executable, "-c", code, cwd=tmp_path).returncode:
        pytest.skip("panda-rl is installed in this environment")
    done = run(SCRIPTS / "panda", "list", "rewards", cwd=tmp_path)
    assert done.returncode == 2 and "unknown kind 'rewards'" in done.stderr
