"""What panda imports is what setup.cfg declares."""

from __future__ import annotations

import ast
import re
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]


def normalised(name: str) -> str:
    """A distribution's name in its normal form: PyYAML, pyyaml and Py_YAML are the same."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> set[str]:
    """The distributions that setup.cfg has users install, without those that only the tests need."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = [text for name, text in setup["options.extras_require"].items() if name != "test"]
    lines = "\n".join([setup["options"]["install_requires"], *extras]).split("\n")
    return {normalised(re.match(r"[\w.-]+", line)[0]) for line in lines if line}  # type: ignore[index]


def imported(source: str) -> set[str]:
    """The top-level packages that ``source`` imports anywhere, also those only for the type checker."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "find_spec")):
            names |= {word.value for word in node.args[:1] if isinstance(word, ast.Constant)}
    return {name.partition(".")[0] for name in names}


def test_every_import_is_of_a_declared_distribution() -> None:
    providers = packages_distributions()
    undeclared = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in (ROOT / "panda").rglob("*.py")
        if ROOT / "panda" / "example" not in path.parents  # a copy of that package, in an sdist
        for module in imported(path.read_text()) - sys.stdlib_module_names - {"panda"}
        if not {*map(normalised, providers.get(module, [module]))} & declared()
    }
    assert undeclared == set()


def test_an_import_is_found_anywhere_in_a_module() -> None:
    source = """
import a.b, c
def f():
    from d.e import g
    if TYPE_CHECKING:
        import h
    importlib.import_module("i.j")
    find_spec("k")
"""
    assert imported(source) == {"a", "c", "d", "h", "i", "k"}


def test_what_a_run_needs_has_a_lowest_version() -> None:
    """`.ci/ends low` runs the tests with these."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split("\n")
    assert [line for line in lines if line and not re.fullmatch(r"[\w-]+>=[\d.]+(,<[\d.]+)?", line)] == []
