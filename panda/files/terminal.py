"""Text from data, for a terminal: characters that would steer it are written as escapes."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from collections.abc import Iterator
from typing import TextIO

_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 except tab and newline, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks, embeddings, overrides and isolates of bidirectional text
    "\u2028\u2029"  # separators of lines and paragraphs
    "\ud800-\udfff]"  # halves of surrogate pairs, which cannot be printed at all
)
_BREAKING = re.compile("[\t\n]")


def printable(text: str) -> str:
    r"""``text`` with the characters that steer a terminal as escapes: ``\x1b``, ``\u202e``. Tab and newline are kept.

    Any part of a text may be given by itself, so it also serves text that is printed as it comes.
    """
    return _STEERING.sub(_escaped, text)


def printable_line(text: str) -> str:
    r"""``text`` on one line: as ``printable`` writes it, with tab and newline as ``\t`` and ``\n``."""
    return _BREAKING.sub(_escaped, printable(text))


def _escaped(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape", "surrogatepass").decode("ascii")


def number_of(count: int, noun: str, plural: str = "") -> str:
    """``count`` with its ``noun``, singular for one: `1 step`, `1,000 steps`; ``plural`` where it is no added s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def fitted(lines: Iterable[str], indent: int, stream: TextIO | None = None) -> Iterator[str]:
    """``lines``, wrapped at words where ``stream``, by default stdout, is a terminal and they are longer than it.

    The lines that follow are ``indent`` columns in.
    """
    stream = stream or sys.stdout
    if stream is None or not stream.isatty():
        yield from lines
        return
    width = max(2 * indent, shutil.get_terminal_size().columns - 1)
    for line in lines:
        short = len(line) <= width
        yield from (
            [line]
            if short
            else textwrap.wrap(
                line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
            )
        )
