"""Packages in plugins/ as other users get them: built, and installed outside this environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PLUGINS = Path(__file__).parents[1] / "plugins"
SCRIPTS = Path(sys.executable).parent


def run(*command: str | Path, cwd: Path, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``command`` with ``site`` as PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(site)} if site else {}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


def install(name: str, folder: Path) -> Path:
    """Install the wheel of the package ``name``, built of a copy in ``folder / "source"``; the folder it is in."""
    # setuptools builds in the source tree, and files of an older build there would get into the wheel.
    leftovers = shutil.ignore_patterns("build", "dist", "*.egg-info", "__pycache__", ".*")
    shutil.copytree(PLUGINS / name, folder / "source", ignore=leftovers)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    alone = ("--no-index", "--no-deps")
    for command in (
        (*pip, "wheel", *alone, "--no-build-isolation", "--wheel-dir", folder / "wheels", folder / "source"),
        (*pip, "install", *alone, "--find-links", folder / "wheels", "--target", folder / "site", name),
    ):
        done = run(*command, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"
