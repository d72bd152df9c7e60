"""The components that a module declares, read from its source without importing it.

Metadata says which names exist, and the module what they are. ``panda list`` and the message for a key of
a component that was not chosen need that without running a stranger's code, so this reads the decorators from
the syntax tree.
"""

from __future__ import annotations

import ast
import functools
import importlib.machinery
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Declaration:
    """A ``@register_...("name")`` in a source file."""

    kind: str
    names: tuple[str, ...]
    summary: str
    keys: frozenset[str]
    """Fields of its options class and of that class's bases, where their sources can be found."""
    line: int


@functools.cache
def declarations(module: str, file: str = "") -> tuple[Declaration, ...]:
    """The components that ``module`` declares; none where its source cannot be found or read.

    ``file``: where its source is, if that is known.
    """
    found = []
    for node in _parsed(module, file).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            for decorator in node.decorator_list:
                declared = _read(decorator, node, module)
                if declared:
                    found.append(declared)
    return tuple(found)


def line_of_hooks(module: str, file: str) -> int | None:
    """The line of the first function marked with ``@hookimpl`` at the top of ``module``; None where there is none."""
    for node in _parsed(module, file).body:
        for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            function = decorator.func if isinstance(decorator, ast.Call) else decorator
            if "hookimpl" in (getattr(function, "id", ""), getattr(function, "attr", "")):
                return node.lineno
    return None


def forget_sources() -> None:
    """Read sources again when they are asked for: files of a user change while a process runs."""
    declarations.cache_clear()
    _parsed.cache_clear()


def module_summary(module: str, file: str = "") -> str:
    """First line of the docstring of ``module``, without importing it. ``file``: its source, if that is known."""
    return (ast.get_docstring(_parsed(module, file)) or "").partition("\n")[0]


@functools.cache
def _parsed(module: str, file: str = "") -> ast.Module:
    """The syntax tree of ``module``; an empty one where its source cannot be found or read."""
    path = Path(file) if file else source_file(module)
    try:
        return ast.parse(path.read_bytes()) if path else ast.Module([], [])
    except (OSError, SyntaxError, ValueError, RecursionError):
        return ast.Module([], [])


def _read(decorator: ast.expr, node: ast.FunctionDef | ast.ClassDef, module: str) -> Declaration | None:
    if not (isinstance(decorator, ast.Call) and decorator.args and isinstance(decorator.args[0], ast.Constant)):
        return None
    function = decorator.func
    called = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
    if not called.startswith("register_"):
        return None
    arguments = {keyword.arg: keyword.value for keyword in decorator.keywords}
    names = [str(decorator.args[0].value)]
    aliases = arguments.get("aliases")
    if isinstance(aliases, (ast.Tuple, ast.List)):
        names += [str(item.value) for item in aliases.elts if isinstance(item, ast.Constant)]
    options = arguments.get("options")
    keys = _field_names(module, options.id) if isinstance(options, ast.Name) else frozenset()
    summary = (ast.get_docstring(node) or "").partition("\n")[0]
    return Declaration(called.removeprefix("register_"), tuple(names), summary, keys, node.lineno)


def _field_names(module: str, name: str, above: frozenset[tuple[str, str]] = frozenset()) -> frozenset[str]:
    """Fields of the class ``name`` of ``module``, its own or imported, and of its bases; ``above`` is being read."""
    if (module, name) in above:  # modules that import a name from each other
        return frozenset()
    above |= {(module, name)}
    found: set[str] = set()
    for node in _parsed(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            fields = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
            found |= {target.id for target in fields if isinstance(target, ast.Name)}
            for base in node.bases:
                if isinstance(base, ast.Name):
                    found |= _field_names(module, base.id, above)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    found |= _field_names(source, alias.name, above)
    return frozenset(found)


def source_file(module: str) -> Path | None:
    """The source of ``module``. ``importlib.util.find_spec`` would import its parents; this imports nothing."""
    search: list[str] | None = None
    origin = None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            try:
                spec = find(name, search) if find else None
            except Exception:  # a stranger's finder: whatever it raises, there is no source to read
                spec = None
            if spec is not None:
                break
        else:
            return None
        if not isinstance(spec, importlib.machinery.ModuleSpec):
            return None
        search = list(spec.submodule_search_locations or []) or None
        origin = spec.origin
    return Path(origin) if origin and origin.endswith(".py") else None
