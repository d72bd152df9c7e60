"""The lengths of samples as a histogram, with the cut marked: its numbers, as lines of text, and as a picture."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from panda.hooks.curves import dress
from panda.hooks.curves import new_figure

if TYPE_CHECKING:
    import numpy as np

BAR = 40
"""Width of the longest bar of text, in characters."""
PICTURED = 60
"""Bars of a picture, at most."""


def counted(lengths: np.ndarray, bins: int) -> list[tuple[int, int, int]]:
    """At most ``bins`` bins of equal whole width that cover ``lengths``: the least and the most of each, and how many
    of ``lengths`` it has."""
    import numpy as np

    if not len(lengths):
        return []
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // bins))
    edges = range(low, high + width + 1, width)
    counts, _ = np.histogram(lengths, bins=list(edges))
    ends = pairwise(edges)
    return [(start, min(end - 1, high), int(count)) for (start, end), count in zip(ends, counts, strict=True)]


def lines(lengths: np.ndarray, bins: int, *, limit: int, cut: str) -> list[str]:
    """The histogram as lines of text, one a bin, and a line for ``limit``, in tokens: ``cut`` says what it cuts."""
    found = counted(lengths, bins)
    width = len(f"{max((most for _, most, _ in found), default=0):,}")
    highest = max((count for _, _, count in found), default=0)
    names = [name_of(least, most, width) for least, most, _ in found]
    widest = max(map(len, names), default=0)
    shown = [
        f"  {name:{widest}}  {'█' * round(BAR * count / highest):{BAR}} {count:,}"
        for name, (_, _, count) in zip(names, found, strict=True)
    ]
    reached = bool(found) and found[-1][1] >= limit
    return [*shown, f"  {'─' * widest}  {cut}"] if reached else shown


def name_of(least: int, most: int, width: int = 0) -> str:
    """The lengths of a bin in words, each number in ``width`` characters: `27`, or `27 to 29`."""
    return f"{least:>{width},}" if least == most else f"{least:>{width},} to {most:>{width},}"


def shows_cut(longest: int, limit: int) -> bool:
    """Whether the axis of lengths up to ``longest`` goes on to ``limit``: else the bars would be pressed together."""
    return longest >= limit // 2


def draw_lengths(lengths: np.ndarray, path: Path, *, title: str, limit: int, cut: str) -> None:
    """Draw the histogram into ``path``, with a line at ``limit``, in tokens, which ``cut`` explains."""
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    found = counted(lengths, PICTURED)
    # A length stands in the middle of its bar, where the axis has its number.
    starts, widths = [least - 0.5 for least, _, _ in found], [most + 1 - least for least, most, _ in found]
    axes.bar(starts, [count for _, _, count in found], width=max(widths, default=1), align="edge", color="C0")
    axes.yaxis.get_major_locator().set_params(integer=True)
    longest = max((most for _, most, _ in found), default=0)
    if shows_cut(longest, limit):
        axes.axvline(limit + 0.5, color="C3", linestyle="--", linewidth=1.5, label=f"max_seq_length: {cut}")
        figure.legend(loc="outside lower center")
    axes.set_ylabel("samples")
    axes.set_title(title, parse_math=False)
    dress(axes, "tokens of a sample")
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)
    figure.savefig(path)
