"""The JSON file that ``deepspeed_config`` names: its content, and the line of a key."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from typing import Any

from panda.registry import UserError
from panda.registry.location import resolve_path

if TYPE_CHECKING:
    from panda.configuration.options import RunOptions


def read_deepspeed_file(options: RunOptions) -> dict[str, Any]:
    """The content of the file that ``options.deepspeed_config`` names; empty if it names none.

    Raises UserError if it cannot be read, is not a JSON object, or has a key twice.
    """
    file = options.deepspeed_config
    if file is None:
        return {}
    try:
        text = resolve_path(file).read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_without_repetition)
    except OSError as problem:
        raise UserError(f"deepspeed_config: {file}: {problem.strerror}.") from None
    except (ValueError, RecursionError) as problem:
        raise UserError(f"deepspeed_config: {file}: not valid JSON: {problem}.") from None
    if not isinstance(content, dict):
        raise UserError(f"deepspeed_config: {file}: expected a JSON object, {{...}}.")
    return content


def place_of(file: str, path: str) -> str:
    """``FILE:LINE`` of the key at the dotted ``path``; ``FILE`` if the line cannot be found."""
    import yaml  # json gives no line numbers, and yaml reads JSON, except for some white space

    try:
        node: Any = yaml.compose(resolve_path(file).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        for name in path.split("."):
            key, node = next((key, value) for key, value in node.value if key.value == name)
    except (OSError, ValueError, TypeError, AttributeError, StopIteration, RecursionError, yaml.YAMLError):
        return file
    return f"{file}:{key.start_mark.line + 1}"


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} appears twice in one object")
    return content
