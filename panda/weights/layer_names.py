"""Which layer a tensor or a module belongs to, by its name."""

from __future__ import annotations

import re


def layer_of(name: str) -> str | None:
    """The layer that ``name`` is in, or is: ``model.layers.0``, all up to its first number; None outside of layers."""
    found = re.match(r"([^.]+\.)*?\d+(?=\.|$)", name)
    return found.group() if found else None
