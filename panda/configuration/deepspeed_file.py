"""The JSON file that ``deepspeed_config`` names: what it holds, and where in it a key stands."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from typing import Any

from panda.registry import UserError
from panda.registry.location import resolve_path

if TYPE_CHECKING:
    from panda.configuration.options import RunOptions


def read_deepspeed_file(options: RunOptions) -> dict[str, Any]:
    """What the file of ``options.deepspeed_config`` holds; nothing where none is named.

    Raises UserError where it cannot be read, is no JSON object, or has a key twice.
    """
    file = options.deepspeed_config
    if file is None:
        return {}
    try:
        text = resolve_path(file).read_text(encoding="utf-8")
        held = json.loads(text, object_pairs_hook=_without_repetition)
    except OSError as problem:
        raise UserError(f"deepspeed_config: {file}: {problem.strerror}.") from None
    except ValueError as problem:
        raise UserError(f"deepspeed_config: {file}: not valid JSON: {problem}.") from None
    if not isinstance(held, dict):
        raise UserError(f"deepspeed_config: {file}: expected a JSON object, {{...}}.")
    return held


def place_of(file: str, path: str) -> str:
    """``FILE:LINE`` of the key at the dotted ``path``; ``FILE`` where the line is not known."""
    import yaml  # which keeps the lines that json forgets, and reads JSON but for some of its white space

    try:
        node: Any = yaml.compose(resolve_path(file).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        for name in path.split("."):
            key, node = next((key, value) for key, value in node.value if key.value == name)
    except (OSError, ValueError, TypeError, AttributeError, StopIteration, yaml.YAMLError):
        return file
    return f"{file}:{key.start_mark.line + 1}"


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held = dict(pairs)
    if len(held) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} stands twice in one object")
    return held
