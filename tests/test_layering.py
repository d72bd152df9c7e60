"""Imports point one way, judged by the syntax trees of all modules. Code under TYPE_CHECKING does not count."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "panda"
LEVELS: tuple[set[str], ...] = (
    {"registry"},
    {"files"},
    {"weights"},
    {"optim", "configuration"},
    {"data", "engine", "models", "installation"},
    {"tasks", "answers"},
    {"run"},
    {"runner"},
    {"hooks"},
    {"report"},
    {"training"},
    {"cli"},
    {"testing"},
    {"__main__"},
)
"""Rooms from the ground up: each imports only what is below it, and rooms on one level do not import each other."""

MAY_IMPORT: dict[str, set[str]] = {"__init__": {"registry", "training"}}
for number, rooms in enumerate(LEVELS):
    MAY_IMPORT |= {room: set().union(*LEVELS[:number]) for room in rooms}

HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "deepspeed",
    "tokenizers",
    "safetensors",
    "matplotlib",
    "peft",
    "fairscale",
    "pyarrow",
    "datasets",
}


def modules() -> list[Path]:
    """The modules of panda. In an sdist, ``panda/example`` is a copy of that package and no link to it."""
    return sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "example")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, *, nested: bool = True) -> Iterator[tuple[str, int]]:
    """Dotted names that ``tree`` imports, with their lines; with ``nested``, also imports inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imports(ast.Module([other], []), nested=nested)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield str(node.module), node.lineno
            if node.module == "panda":
                yield from ((f"panda.{alias.name}", node.lineno) for alias in node.names)
        elif nested or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports(node, nested=nested)


def all_imports(*, nested: bool = True) -> Iterator[tuple[Path, str, int]]:
    for path in modules():
        for name, line in imports(ast.parse(path.read_text()), nested=nested):
            yield path, name, line


def test_every_room_has_its_place() -> None:
    assert {room_of(path) for path in modules()} == set(MAY_IMPORT)


def test_imports_point_one_way() -> None:
    wrong = []
    for path, name, line in all_imports():
        parts = name.split(".")
        room = room_of(path)
        if parts[0] != "panda" or len(parts) == 1:
            continue
        target = parts[1]
        is_module = (PACKAGE / target).is_dir() or (
            PACKAGE / f"{target}.py"
        ).exists()  # else it is a name in panda/__init__.py
        if is_module and target != room and target not in MAY_IMPORT[room]:
            wrong.append(f"{path.relative_to(ROOT)}:{line}: {room} imports {name}")
    assert wrong == []


def test_one_package_imports_deepspeed_and_fairscale() -> None:
    outside = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, name, line in all_imports()
        if name.split(".")[0] in ("deepspeed", "fairscale") and room_of(path) != "engine"
    ]
    assert outside == []


def registering() -> list[Path]:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    declared = set()
    for group, text in setup["options.entry_points"].items():
        if group.startswith("panda."):
            declared |= {line.partition("=")[2].strip() for line in text.strip().splitlines()}
    return sorted((ROOT / module.replace(".", "/")).with_suffix(".py") for module in declared)


def panda_imports_at_top(path: Path, seen: set[Path]) -> set[Path]:
    """The modules of panda that importing ``path`` imports, directly or not, including packages."""
    for name, _ in imports(ast.parse(path.read_text()), nested=False):
        parts = name.split(".")
        if parts[0] != "panda":
            continue
        for depth in range(1, len(parts) + 1):
            target = ROOT.joinpath(*parts[:depth])
            file = target / "__init__.py" if target.is_dir() else target.with_suffix(".py")
            if file.exists() and file not in seen:
                seen.add(file)
                panda_imports_at_top(file, seen)
    return seen


@pytest.mark.parametrize("path", registering(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_that_registers_components_imports_nothing_heavy(path: Path) -> None:
    heavy = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in {path} | panda_imports_at_top(path, set())
        for name, line in imports(ast.parse(file.read_text()), nested=False)
        if name.split(".")[0] in HEAVY
    ]
    assert heavy == []


def test_every_module_that_registers_components_is_declared() -> None:
    decorated = {path for path in modules() if re.search(r"^@register_\w+\(", path.read_text(), re.MULTILINE)}
    assert decorated - set(registering()) == set()


def test_the_init_of_a_package_imports_nothing_heavy() -> None:
    heavy = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, name, line in all_imports(nested=False)
        if path.name == "__init__.py" and name.split(".")[0] in HEAVY
    ]
    assert heavy == []


def test_every_import_is_seen_by_this_test() -> None:
    """The walk finds imports at the top, in functions, classes and branches, but not those for the type checker."""
    source = """
import a
from b.c import d
if TYPE_CHECKING:
    import e
else:
    import f
class G:
    import h
def i():
    from j import k
    if x:
        import m
try:
    import n
except ImportError:
    import o
"""
    tree = ast.parse(source)
    assert [name for name, _ in imports(tree)] == ["a", "b.c", "f", "h", "j", "m", "n", "o"]
    assert [name for name, _ in imports(tree, nested=False)] == ["a", "b.c", "f", "h", "n", "o"]


LONG = 60
MANY = 6
EXCUSED = {
    "optim/layerwise_triton.py:_move": "a Triton kernel: what it reads is what it is given",
    "models/forward/softmax_triton.py:_gradient": "a Triton kernel: what it reads is what it is given",
    "models/adapters/low_rank_triton.py:_multiply": "a Triton kernel: what it reads is what it is given",
    "optim/layerwise_triton.py:_update": "a Triton kernel: what it reads is what it is given",
    "models/forward/flash_attention_4.py:_forward": "an operation of torch, which takes all by position",
    "models/forward/flash_attention_4.py:_backward": "an operation of torch, which takes all by position",
}
"""Functions that may be longer or take more parameters, each with the reason."""


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.relative_to(PACKAGE)}:{node.name}", node


def test_functions_are_short_and_take_few_parameters() -> None:
    """So that a reader can keep them in mind. Keyword-only parameters do not count, since a call names them."""
    found = set()
    for name, node in functions():
        lines = (node.end_lineno or 0) - node.lineno + 1
        docstring = ast.get_docstring(node)
        lines -= len(docstring.splitlines()) if docstring else 0
        given = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args) if argument.arg != "self"]
        if lines > LONG or len(given) > MANY:
            found.add(name)
    assert found == set(EXCUSED)


def test_json_and_yaml_that_nest_too_deeply_are_damage_and_no_traceback() -> None:
    """What expects damaged text of a parser (ValueError) also expects RecursionError, which is none."""
    found = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Try):
                continue
            body = " ".join(map(ast.unparse, node.body))
            caught = " ".join(ast.unparse(handler.type or ast.Name("Exception")) for handler in node.handlers)
            parses = re.search(r"\bjson\.loads?\(|\byaml\.(safe_load|load|compose)\(", body)
            if parses and re.search("ValueError|YAMLError", caught) and not re.search("RecursionError|Exc", caught):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found
