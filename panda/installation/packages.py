"""The installed distributions that have to do with panda, by their metadata. Imports none of them."""

from __future__ import annotations

import ast
import configparser
import difflib
import importlib.metadata
import json
import re
import tomllib
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote
from urllib.parse import urlparse

from panda.installation.findings import Finding
from panda.registry.api import API_GROUP
from panda.registry.declarations import source_file
from panda.registry.kinds import KINDS
from panda.registry.offers import OWN_DISTRIBUTION
from panda.registry.offers import normalised

Declared = Mapping[str, Mapping[str, str]]
"""Entry points: group to name to value."""


@dataclass(frozen=True)
class Package:
    """An installed distribution that offers something to panda, or requires it."""

    distribution: importlib.metadata.Distribution
    earlier: tuple[importlib.metadata.Distribution, ...] = ()
    """Others of the same name, which are further behind on sys.path and not used."""

    @cached_property
    def name(self) -> str:
        return normalised(self.distribution.metadata["Name"] or "?")

    @cached_property
    def version(self) -> str:
        return self.distribution.metadata["Version"] or "?"

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def offered(self) -> str:
        """How many names of each kind it declares, for messages."""
        counts = [f"{group[6:]}: {len(names)}" for group, names in self.declared.items() if group != API_GROUP]
        return ", ".join(counts) or "no names"

    @property
    def is_own(self) -> bool:
        """Whether it is panda itself."""
        return self.name == OWN_DISTRIBUTION

    @cached_property
    def text(self) -> str:
        return entry_points_text(self.distribution)

    @cached_property
    def declared(self) -> Declared:
        """Its entry points of groups that are meant for panda."""
        return parsed(self.text)[0]

    @cached_property
    def modules(self) -> list[str]:
        """The modules that its entry points name, each once."""
        values = (value for group, names in self.declared.items() if group != API_GROUP for value in names.values())
        return list(dict.fromkeys(module_of(value) for value in values))

    @cached_property
    def source_folder(self) -> Path | None:
        """The folder that an editable installation refers to; None for another installation."""
        return editable_folder(self.distribution)

    @cached_property
    def roots(self) -> list[str]:
        """The top-level packages and modules that it brings, as far as its metadata says."""
        named = [module.partition(".")[0] for module in self.modules]
        listed = (self.distribution.read_text("top_level.txt") or "").split()
        files = [] if self.source_folder else self.distribution.files or []
        tops = [file.parts[0] for file in files if file.suffix == ".py" and file.parts[0] not in ("..", "__pycache__")]
        found = [*named, *listed, *(top.removesuffix(".py") for top in tops)]
        return [root for root in dict.fromkeys(found) if root.isidentifier() and not root.startswith("__")]

    def sources(self) -> list[str]:
        """The dotted names of all modules below its roots of which there are sources."""
        found = []
        for root in self.roots:
            path = source_file(root)
            if path is None:
                continue
            if path.name != "__init__.py":
                found.append(root)
                continue
            for file in sorted(path.parent.rglob("*.py")):
                parts = file.relative_to(path.parent.parent).with_suffix("").parts
                if all(part.isidentifier() for part in parts):
                    found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        return found


def packages() -> list[Package]:
    """Every distribution that offers something to panda, or requires it; panda itself first."""
    by_name: dict[str, list[importlib.metadata.Distribution]] = {}
    for distribution in importlib.metadata.distributions():
        try:
            name = normalised(distribution.metadata["Name"] or "?")
        except Exception:  # METADATA that is gone or is no text
            name = "?"
        by_name.setdefault(name, []).append(distribution)
    found = [
        Package(first, tuple(others)) for name, (first, *others) in by_name.items() if _concerns_panda(name, first)
    ]
    return sorted(found, key=lambda package: (not package.is_own, package.name))


def _concerns_panda(name: str, distribution: importlib.metadata.Distribution) -> bool:
    if name == OWN_DISTRIBUTION or any(is_meant_for_panda(group) for group in _groups(distribution)):
        return True
    required = distribution.requires or []
    return any(normalised(re.split(r"[^\w.-]", each.strip(), maxsplit=1)[0]) == OWN_DISTRIBUTION for each in required)


@cache
def is_meant_for_panda(group: str) -> bool:
    """Whether the entry points of ``group`` were meant for panda, perhaps misspelt: `panda_models`, `pandas.task`."""
    known = [kind.group for kind in KINDS.values()]
    return group.lower().startswith("panda.") or bool(difflib.get_close_matches(plain(group), known, n=1, cutoff=0.88))


def plain(group: str) -> str:
    """``group`` as panda writes groups: small letters, and one point."""
    first, _, rest = re.sub("[-.]", "_", group.lower()).partition("_")
    return f"{first}.{rest}"


def _groups(distribution: importlib.metadata.Distribution) -> list[str]:
    return re.findall(r"^\s*\[([^\]]+)\]", entry_points_text(distribution), re.MULTILINE)


def entry_points_text(distribution: importlib.metadata.Distribution) -> str:
    """The content of entry_points.txt; empty where there is none that can be read."""
    try:
        return distribution.read_text("entry_points.txt") or ""
    except Exception:  # no text, or a finder of somebody else's
        return ""


def parsed(text: str) -> tuple[Declared, list[str]]:
    """The entry points of groups meant for panda in ``text``, and lines that are none."""
    declared: dict[str, dict[str, str]] = {}
    odd = []
    group = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            group = line.strip("[] ")
        elif line and not line.startswith("#") and is_meant_for_panda(group):
            name, equals, value = line.partition("=")
            if equals and name.strip() and value.strip():
                declared.setdefault(group, {})[name.strip()] = value.strip()
            else:
                odd.append(f"[{group}] {line}")
    return declared, odd


def module_of(value: str) -> str:
    """The module that the value of an entry point names: before `:` and extras."""
    return value.partition(":")[0].partition("[")[0].strip()


def editable_folder(distribution: importlib.metadata.Distribution) -> Path | None:
    """The source folder of an editable installation; None for another one."""
    try:
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    except (OSError, ValueError, RecursionError):
        return None
    if not (isinstance(origin, dict) and origin.get("dir_info", {}).get("editable")):
        return None
    return Path(unquote(urlparse(str(origin.get("url", ""))).path))


# -- stale metadata ---------------------------------------------------------------------------


def stale(package: Package) -> list[Finding]:
    """Findings about metadata that no longer matches the files."""
    found = [
        Finding(
            f"{package.label}",
            f"its metadata is there again as version {_version(other)}, at {getattr(other, '_path', '?')}, with other"
            " entry points; that is not used",
            f"Remove the older one: `pip uninstall {package.name}` until it is gone, delete what is left, and install"
            " it again.",
            is_broken=False,
        )
        for other in package.earlier
        if parsed(entry_points_text(other))[0] != package.declared
    ]
    folder = package.source_folder
    if folder is None:
        return found
    if not folder.is_dir():
        return [
            *found,
            Finding(
                package.label,
                f"it was installed in editable mode from {folder}, which is gone",
                f"Install it again from where it is now, or `pip uninstall {package.name}`.",
            ),
        ]
    written = declared_in_source(folder)
    if written is None or written == package.declared:
        return found
    for group in sorted({*written, *package.declared}):
        new, old = written.get(group, {}), package.declared.get(group, {})
        changed = [f"{name} = {value}" for name, value in new.items() if old.get(name) != value]
        gone = [name for name in old if name not in new]
        says = [f"has {', '.join(changed)}"] * bool(changed) + [f"lacks {', '.join(gone)}"] * bool(gone)
        if says:
            problem = f"{folder} {' and '.join(says)} under {group}, unlike what is installed"
            found.append(Finding(package.label, problem, f"Install it again: `pip install -e {folder}`."))
    return found


def _version(distribution: importlib.metadata.Distribution) -> str:
    return distribution.metadata["Version"] or "?"


def declared_in_source(folder: Path) -> Declared | None:
    """The entry points for panda that files in ``folder`` declare: the first that has any of pyproject.toml,
    setup.cfg or setup.py. None if that cannot be said."""
    project, setup = folder / "pyproject.toml", folder / "setup.cfg"
    try:
        written = tomllib.loads(project.read_text(encoding="utf-8")) if project.exists() else {}
        groups = written.get("project", {}).get("entry-points")
        if isinstance(groups, dict):
            return {group: names for group, names in groups.items() if is_meant_for_panda(group)}
        if setup.exists():
            file = configparser.ConfigParser(delimiters=("=",))
            file.optionxform = str  # type: ignore[assignment, method-assign]
            file.read_string(setup.read_text(encoding="utf-8"))
            if file.has_section("options.entry_points"):
                section = dict(file["options.entry_points"])
                return parsed("\n".join(f"[{group}]\n{lines}" for group, lines in section.items()))[0]
        return _of_setup_py(folder / "setup.py")
    except (OSError, ValueError, configparser.Error):
        return None


def _of_setup_py(path: Path) -> Declared | None:
    """The ``entry_points`` of a literal call of ``setup``; None where there is none that can be read."""
    if not path.exists():
        return None
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "entry_points":
            groups = ast.literal_eval(node.value)
            lines = {group: [some] if isinstance(some, str) else some for group, some in groups.items()}
            return parsed("\n".join(f"[{group}]\n" + "\n".join(some) for group, some in lines.items()))[0]
    return None


def named(every: Sequence[Package], name: str) -> Package | None:
    """The package called ``name``, in any spelling; None where there is none."""
    return next((package for package in every if package.name == normalised(name)), None)
