"""Distributions that look installed: a folder on sys.path with a dist-info and modules, for as long as they are needed.

What an installed package does is tested without building and installing one.
"""

from __future__ import annotations

import importlib
import os
import sys
import textwrap
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

from panda.registry import components
from panda.registry import declarations
from panda.registry import offers


class Distributions:
    """Makes distributions below ``folder``. ``header`` is the beginning of every module."""

    def __init__(self, folder: Path, header: str = "") -> None:
        self.folder = folder
        self.header = header
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
        """Install ``modules`` (dotted name to source) and ``entry_points`` (kind in the plural to name to module).

        ``metadata`` is the text of METADATA, by default the least that is valid. Returns the folder that they are in,
        which is on sys.path and in PYTHONPATH.
        """
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
            file.write_text(self.header + textwrap.dedent(source))
            self.modules.add(module.partition(".")[0])
        sys.path.append(str(site))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(site)]))
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


@contextmanager
def fake_distributions(folder: Path, header: str = "") -> Iterator[Distributions]:
    """Distributions below ``folder`` that this process, and those that it starts, see as installed, until the end of
    the ``with``.

    with fake_distributions(tmp_path) as made:
        made.install("acme-panda", {"models": {"tiny": "acme.tiny"}}, {"acme.tiny": source})
    """
    made = Distributions(folder, header)
    path_before, variable_before = list(sys.path), os.environ.get("PYTHONPATH")
    recorded_before = set(components._recorded)
    try:
        yield made
    finally:
        sys.path[:] = path_before
        os.environ.pop("PYTHONPATH", None)
        if variable_before is not None:
            os.environ["PYTHONPATH"] = variable_before
        for key in set(components._recorded) - recorded_before:
            if not key[2].startswith("panda."):  # those modules stay imported
                del components._recorded[key]
        for name in [name for name in sys.modules if name.partition(".")[0] in made.modules]:
            del sys.modules[name]
        forget_installed()
