"""Counts in messages: `1 step`, `2 steps`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import panda
from panda.files.terminal import number_of

SOURCES = [
    (path, ast.parse(path.read_text()))
    for path in sorted(Path(panda.__file__).parent.rglob("*.py"))
    if path.parent.name != "registry"
]
BOUNDS = {"token", "position", "byte", "entry", "parameter", "character", "weight", "tensor"}
"""What is counted in thousands: limits, and what fills them."""


def test_one_is_singular() -> None:
    assert [number_of(count, "step") for count in (0, 1, 2, 1000)] == ["0 steps", "1 step", "2 steps", "1,000 steps"]
    assert [number_of(count, "entry is", "entries are") for count in (1, 3)] == ["1 entry is", "3 entries are"]


def nouns() -> set[str]:
    """The nouns that panda counts with `number_of`."""
    found = set()
    for _, tree in SOURCES:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "number_of":
                noun = node.args[1]
                if isinstance(noun, ast.Constant):
                    found |= {re.sub(r" (is|are|has|stays|that.*)$", "", str(noun.value)).split()[-1]}
    return found - BOUNDS


def counts() -> Iterator[tuple[str, str, str]]:
    """The texts of panda in which a number with separators, or a length, is before a text; with what follows it."""
    for path, tree in SOURCES:
        for node in ast.walk(tree):
            if not isinstance(node, ast.JoinedStr):
                continue
            before = ""
            for part, after in zip(node.values, [*node.values[1:], ast.Constant("")], strict=True):
                if isinstance(part, ast.FormattedValue) and isinstance(after, ast.Constant):
                    spec = ast.unparse(part.format_spec) if part.format_spec else ""
                    if ("," in spec and "." not in spec) or ast.unparse(part.value).startswith("len("):
                        yield f"{path.name}:{part.lineno}", before, str(after.value)
                before = str(part.value) if isinstance(part, ast.Constant) else ""


def test_what_is_counted_can_be_one() -> None:
    known = nouns()
    assert {"step", "sample", "row", "file", "run", "record"} <= known
    plain = re.compile(rf" (?:[a-z]+ )?({'|'.join(sorted(known))})s\b")
    found = [
        f"{where}: {after[:30]}" for where, before, after in counts() if plain.match(after) and not is_part(before)
    ]
    assert "\n".join(found) == ""


def is_part(before: str) -> bool:
    """Whether the number is that of the whole, as in `1 of 3 rows`, where the plural stands for any number."""
    return before.endswith((" of ", " of the "))
