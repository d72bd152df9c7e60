"""Text for a terminal, which would obey some characters instead of showing them."""

from __future__ import annotations

import re

# C0 except tab and newline, delete, C1, and what reorders text (bidirectional marks, embeddings, overrides, isolates).
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    r"""``text`` with what a terminal would obey written as in Python, such as ``\x1b`` for the escape character."""
    return _OBEYED.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)
