"""Distributions that look installed: a folder on sys.path with a dist-info and modules, gone after the test."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import textwrap
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path

import pytest

from panda.registry import components
from panda.registry import declarations
from panda.registry import offers

IMPORTS = """\
from dataclasses import dataclass
from typing import Annotated
from typing import Literal
from panda.registry import *
"""
"""The beginning of every module that these tests install."""


class Distributions:
    """Makes distributions below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: set[str] = set()

    def install(
        self,
        name: str,
        entry_points: Mapping[str, Mapping[str, str]],
        modules: Mapping[str, str],
        *,
        version: str = "1.0",
        metadata: str | None = None,
    ) -> Path:
        """Install ``modules`` (dotted name to source) and ``entry_points`` (kind in the plural to name to module)."""
        site = self.folder / f"{name}-{version}"
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(metadata or f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = []
        for plural, names in entry_points.items():
            lines += [f"[panda.{plural}]", *(f"{entry} = {module}" for entry, module in names.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        for module, source in modules.items():
            file = site.joinpath(*module.split(".")).with_suffix(".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            for parent in file.relative_to(site).parents:
                if parent != Path("."):
                    (site / parent / "__init__.py").touch()
            file.write_text(IMPORTS + textwrap.dedent(source))
            self.modules.add(module.partition(".")[0])
        sys.path.append(str(site))
        forget_installed()
        return site

    def imported(self) -> set[str]:
        """Which modules of these distributions have been imported, except packages that contain others."""
        found = {name for name in sys.modules if name.partition(".")[0] in self.modules}
        return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def forget_installed() -> None:
    """Make the next look-up read package metadata and sources again."""
    importlib.invalidate_caches()
    offers.installed.cache_clear()
    declarations.declarations.cache_clear()
    declarations._parsed.cache_clear()


def hide_other_packages(patch: pytest.MonkeyPatch) -> None:
    """In this process, let panda see no packages of others that are installed here: tests say what there is."""
    found = list(importlib.metadata.distributions())
    hidden = {each.name for each in found if "panda." in (each.read_text("entry_points.txt") or "")}
    hidden -= {offers.OWN_DISTRIBUTION}
    if hidden:
        original = importlib.metadata.distributions
        patch.setattr(
            importlib.metadata,
            "distributions",
            lambda **where: (each for each in original(**where) if each.name not in hidden),
        )
        forget_installed()


@pytest.fixture
def distributions(tmp_path: Path) -> Iterator[Distributions]:
    made = Distributions(tmp_path / "site")
    path_before = list(sys.path)
    recorded_before = set(components._recorded)
    yield made
    sys.path[:] = path_before
    for key in set(components._recorded) - recorded_before:
        if not key[2].startswith("panda."):  # those modules stay imported
            del components._recorded[key]
    for name in [name for name in sys.modules if name.partition(".")[0] in made.modules]:
        del sys.modules[name]
    forget_installed()
