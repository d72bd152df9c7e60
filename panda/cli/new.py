"""``panda new plugin NAME``: a package with a component, that installs, passes its tests and trains at once."""

from __future__ import annotations

import importlib.metadata
import keyword
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import panda
from panda.cli.command import run_command
from panda.cli.parser import Parser
from panda.registry import UserError
from panda.registry.api import API_GROUP
from panda.registry.api import API_VERSION
from panda.registry.kinds import KINDS
from panda.registry.offers import installed
from panda.registry.offers import normalised

TEMPLATES = Path(__file__).parent / "templates"
SUMMARIES = {
    "task": "a task of graded answers",
    "model": "a language model of causal convolutions",
    "arch": "sizes of a LLaMA",
    "optimizer": "an optimizer of bounded momentum",
    "lr_scheduler": "a triangular learning rate",
    "reader": "a reader of lines with an input and a target",
    "plugin": "a plugin that prints the lowest loss",
}
"""The kinds of component for which there are templates, and what their components are."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda new``."""
    return run_command(_new, argv)


def parser() -> Parser:
    """The flags of ``panda new``."""
    parser = Parser(
        prog="panda new",
        description="Make a package that adds a component to panda, in a new folder NAME: it installs, passes its"
        " tests and trains at once. Then change it into your own.",
        epilog="example: panda new plugin acme-herons --kind model",
    )
    parser.add_argument("what", choices=["plugin"], help="plugin: a package with a component of any kind")
    parser.add_argument("name", help="of the package, and of its folder: `acme-herons`")
    parser.add_argument("--kind", default="plugin", help=f"of the component: {', '.join(SUMMARIES)}; default: plugin")
    parser.values["kind"] = lambda _: SUMMARIES
    return parser


def _new(argv: list[str]) -> None:
    arguments = parser().parse_args(argv)
    kind = arguments.kind.replace("-", "_")
    if kind not in SUMMARIES:
        raise UserError(f"--kind: {arguments.kind!r} is none of {', '.join(SUMMARIES)}.")
    names = names_of(arguments.name, kind)
    folder = Path(arguments.name)
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder}: exists already, and nothing is overwritten. Choose another name, or remove it.")
    for path, text in files_of(names, kind).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
        print(f"  {folder / path}")
    print(
        f"made {folder}, with {kind} {names['COMPONENT']!r}. Next:\n"
        f"  pip install -e '{folder}[test]'\n"
        f"  pytest {folder}\n"
        f"  panda-train --config {folder}/configs/{names['COMPONENT']}.yaml"
    )
    if kind == "optimizer":
        print(f"  python -m panda.testing.optimizers {names['COMPONENT']} --short  # its certificate: some minutes")


def names_of(name: str, kind: str) -> dict[str, str]:
    """What the placeholders of the templates stand for. Raises UserError for a name that a package cannot have."""
    problem = _problem_of(name)
    if problem:
        raise UserError(f"{name!r} cannot be the name of the package: {problem}")
    package = normalised(name).replace("-", "_")
    component = normalised(name).removeprefix("panda-").removesuffix("-panda")
    for offer in installed()[kind].get(component, ()):
        taken = "panda's own, and a name alone means that" if offer.is_own else f"one of {offer.describe()}"
        raise UserError(f"{name!r}: its {kind} would be called {component!r}, which is {taken}. Choose another name.")
    summary = SUMMARIES[kind]
    return {
        "NAME": normalised(name),
        "PACKAGE": package,
        "MODULE": kind,
        "KIND": kind,
        "COMPONENT": component,
        "IDENTIFIER": component.replace("-", "_"),
        "CLASS": "".join(word.capitalize() for word in component.split("-")),
        "SUMMARY": summary[0].upper() + summary[1:],
        "VERSION": panda.__version__,
        "ENTRY_POINTS": "\n\n".join(_entry_points(kind, component, f"{package}.{kind}")),
    }


def _entry_points(kind: str, component: str, module: str) -> list[str]:
    """The tables of pyproject.toml that declare what the templates of ``kind`` register."""
    declared = {KINDS[kind].group: component}
    if kind == "model":
        declared[KINDS["arch"].group] = f"{component}-tiny"
    tables = [f'[project.entry-points."{group}"]\n"{name}" = "{module}"' for group, name in declared.items()]
    return [*tables, f'[project.entry-points."{API_GROUP}"]\nversion = "v{API_VERSION}"']


def _problem_of(name: str) -> str:
    """Why no new package can have ``name``; empty if it can."""
    package = normalised(name).replace("-", "_")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_.][A-Za-z0-9]+)*", name):
        return "it has to begin with a letter, and have letters, digits and single hyphens: `acme-herons`."
    if keyword.iskeyword(package) or keyword.issoftkeyword(package):
        return f"{package!r} is a word of Python's own, and could not be imported."
    if package in sys.stdlib_module_names:
        return f"{package!r} is a module of Python's own library, which it would hide."
    component = normalised(name).removeprefix("panda-").removesuffix("-panda")
    if not component.replace("-", "_").isidentifier() or keyword.iskeyword(component.replace("-", "_")):
        return f"its component would be called {component!r}, which cannot be a name in Python."
    taken = {normalised(each.name or ""): each.version for each in importlib.metadata.distributions()}
    if normalised(name) in taken:
        return f"{normalised(name)} {taken[normalised(name)]} is installed here. `pip uninstall` it, or choose another."
    spec = find_spec(package)
    if spec is not None:
        where = spec.origin or next(iter(spec.submodule_search_locations or []), "")
        return f"the module {package!r} is there already, at {where}."
    return ""


def files_of(names: dict[str, str], kind: str) -> dict[str, str]:
    """The files of the package, by their paths in its folder."""
    package, component = names["PACKAGE"], names["COMPONENT"]
    places = {
        "module.py": f"{package}/{kind}.py",
        "test_module.py": f"tests/test_{kind}.py",
        "config.yaml": f"configs/{component}.yaml",
        "__init__.py": f"{package}/__init__.py",
        "test_package.py": "tests/test_package.py",
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
    }
    files = {f"{package}/py.typed": ""}
    for template in sorted([*(TEMPLATES / "every").iterdir(), *(TEMPLATES / kind).iterdir()]):
        name = template.name.removesuffix(".txt")
        inside = "sample/" if name.startswith("rows.") else ""
        text = template.read_text(encoding="utf-8")
        for placeholder, value in names.items():
            text = text.replace(f"@{placeholder}@", value)
        files[places.get(name, f"{package}/{inside}{name}")] = text
    return files
