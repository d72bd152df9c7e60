"""Flat YAML: one mapping, one level, every value with its line.

``yaml.safe_load`` keeps the last of two equal keys, reads ``1e-4`` as a text and ``12:30`` as a
number in base 60. So panda composes the nodes, keeps each scalar's own characters, and leaves the
conversion to the type of the option that the key belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import yaml

from panda.registry.errors import UserError
from panda.registry.options import Given


def load_flat_yaml(
    path: Path, foreign: Callable[[str], bool] = lambda key: False, name: str | None = None
) -> dict[str, Given]:
    """Keys and values of the file at ``path``, which origins call ``name``.

    Raises UserError with file and line where it is no YAML of this form. A nested value is kept as one that no option
    takes, so that it is refused with all else that is wrong. ``foreign``: whether a key is one that can be answered; in
    nested values these are found by their paths, ``a.b``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file (looked in {Path.cwd()}).") from None
    except IsADirectoryError:
        inside = sorted(each.name for each in path.iterdir() if each.suffix in (".yaml", ".yml"))
        hint = f" Did you mean {path / inside[0]}?" if inside else " Name a YAML file."
        raise UserError(f"{path}: it is a folder, not a configuration file.{hint}") from None
    except UnicodeDecodeError as problem:
        line = problem.object.count(b"\n", 0, problem.start) + 1
        byte = f"byte 0x{problem.object[problem.start]:02x}"
        raise UserError(f"{path}:{line}: cannot be read: not UTF-8: {byte}. Save the file as UTF-8.") from None
    except (OSError, ValueError) as problem:
        raise UserError(f"{path}: cannot be read: {getattr(problem, 'strerror', None) or problem}.") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        said = [getattr(problem, part, None) for part in ("context", "problem")]
        reason = ", ".join(part for part in said if part) or " ".join(str(problem).split())
        hint = " YAML admits no tab there: use spaces." if "'\\t'" in reason else ""
        raise UserError(f"{where}: not valid YAML: {reason}.{hint}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply. panda's configuration is flat: one level, `key: value`.") from None
    if root is None or root.tag == "tag:yaml.org,2002:null":
        return {}
    if not isinstance(root, yaml.MappingNode):
        found = "a list" if isinstance(root, yaml.SequenceNode) else f"the text {root.value[:40]!r}"
        raise UserError(f"{path}:{root.start_mark.line + 1}: expected `key: value` lines, found {found}.")

    entries: dict[str, Given] = {}
    for key_node, value_node in root.value:
        origin = f"{name or path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{origin}: a key must be a word.")
        key = key_node.value
        if key in entries:
            raise UserError(f"{origin}: {key!r} is given twice, first at {entries[key].origin}. Keep one.")
        if _is_flat(value_node):
            entries[key] = _given(value_node, origin)
            continue
        leaves = {inner: (node, line) for inner, node, line in _leaves(key, value_node, set())}
        known = [inner for inner in leaves if inner != key and foreign(inner)]
        for inner in known:
            node, line = leaves[inner]
            entries.setdefault(inner, _given(node, f"{name or path}:{line}"))
        if len(known) < len(leaves) or not leaves:
            entries[key] = Given(True, origin, "...", is_nested=True)
    return entries


def _leaves(path: str, node: yaml.Node, seen: set[int]) -> Iterator[tuple[str, yaml.Node, int]]:
    """The values in ``node`` that are no mappings, by their paths, with their lines; no mapping twice."""
    for key_node, value in node.value if isinstance(node, yaml.MappingNode) else ():
        inner = f"{path}.{key_node.value}"
        if not isinstance(value, yaml.MappingNode):
            yield inner, value, key_node.start_mark.line + 1
        elif id(value) not in seen:  # an alias may stand for a mapping around it
            seen.add(id(value))
            yield from _leaves(inner, value, seen)


def _is_flat(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) or (
        isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value)
    )


def _given(node: yaml.Node, origin: str) -> Given:
    if isinstance(node, yaml.ScalarNode):
        return Given(_scalar(node), origin, node.value)
    if isinstance(node, yaml.SequenceNode) and _is_flat(node):
        return Given(tuple(map(_scalar, node.value)), origin, ", ".join(item.value for item in node.value))
    return Given(True, origin, "...", is_nested=True)


def _scalar(node: yaml.ScalarNode) -> str | bool | None:
    words = yaml.constructor.SafeConstructor.bool_values
    if node.tag == "tag:yaml.org,2002:bool" and node.value.lower() in words:
        return bool(words[node.value.lower()])
    if node.tag == "tag:yaml.org,2002:null":
        return None
    return str(node.value)
