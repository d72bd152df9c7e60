"""The histogram of lengths: every sample is counted once, and the cut is marked where it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from panda.hooks.lengths import BAR
from panda.hooks.lengths import counted
from panda.hooks.lengths import draw_lengths
from panda.hooks.lengths import lines
from panda.hooks.lengths import name_of

LENGTHS = np.array([2] * 10 + [3] * 5 + [8])


def test_every_sample_is_counted_once() -> None:
    assert counted(LENGTHS, 4) == [(2, 3, 15), (4, 5, 0), (6, 7, 0), (8, 8, 1)]
    assert counted(np.array([5, 5]), 4) == [(5, 5, 2)]
    assert counted(np.array([], dtype=int), 4) == []
    many = np.random.default_rng(1).integers(1, 5000, 10_000)
    assert sum(count for _, _, count in counted(many, 60)) == 10_000 and len(counted(many, 60)) <= 60


def test_bars_of_text_are_to_scale_and_the_cut_is_a_line_after_the_last() -> None:
    found = lines(LENGTHS, 4, limit=8, cut="1 is cut")
    assert [line.split()[-1] for line in found] == ["15", "0", "0", "1", "cut"]
    assert found[0].count("█") == BAR and found[1].count("█") == 0 and found[4].endswith("──  1 is cut")
    assert len(lines(LENGTHS, 4, limit=9, cut="none is cut")) == 4


def test_a_bin_of_one_length_is_called_by_it() -> None:
    assert [line[:8].strip() for line in lines(LENGTHS, 4, limit=9, cut="")] == ["2 to 3", "4 to 5", "6 to 7", "8"]
    found = lines(np.array([27] * 2 + [28, 30]), 12, limit=99, cut="")
    assert [line.replace("█", "").split() for line in found] == [["27", "2"], ["28", "1"], ["29", "0"], ["30", "1"]]
    assert name_of(1200, 2048) == "1,200 to 2,048"


def test_each_length_stands_in_the_middle_of_its_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append(self))
    draw_lengths(np.array([27] * 10), tmp_path / "a.png", title="", limit=2048, cut="")
    [axes] = drawn[0].axes
    [bar] = axes.patches
    assert (bar.get_x() + bar.get_width() / 2, bar.get_width()) == (27, 1)
    low, high = axes.get_xlim()
    assert (low, high) == (26, 28) and {*axes.get_xticks()} == {26, 27, 28}


@pytest.mark.parametrize("limit", [8, 9, 4000])
def test_the_cut_is_a_line_in_the_picture(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (drawn.append(self), saved(self, path))[1])
    draw_lengths(LENGTHS, tmp_path / "a.png", title="$3 of these", limit=limit, cut="what is cut")
    [axes] = drawn[0].axes
    assert sum(bar.get_height() for bar in axes.patches) == len(LENGTHS)
    vertical = [float(line.get_xdata()[0]) for line in axes.lines]
    # A limit far above the lengths would press the bars together.
    assert vertical == ([limit + 0.5] if limit < 10 else [])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
