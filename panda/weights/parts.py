"""Parts that a task gave a model beside its checkpoint, such as a reward head, among the weights of an export."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

from panda.weights.stored_tensor import Weights

PARTS = "panda_parts"
"""Key in the config.json of an export: the names of such parts of the model."""


def parts_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts in an export with the config.json ``config``."""
    named = config.get(PARTS)
    return tuple(each for each in named if isinstance(each, str)) if isinstance(named, list) else ()


def divided(weights: Weights, parts: Iterable[str]) -> tuple[Weights, Weights]:
    """Those of ``weights`` that are not of ``parts``, and those that are."""
    prefixes = tuple(f"{part}." for part in parts)
    of_parts = {name: stored for name, stored in weights.items() if name.startswith(prefixes)} if prefixes else {}
    return {name: stored for name, stored in weights.items() if name not in of_parts}, of_parts
