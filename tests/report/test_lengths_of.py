"""The histogram of lengths on the page of `panda report`: scaled to the lengths."""

from __future__ import annotations

import re

import pytest

from panda.report.reported import Data
from panda.report.texts import lengths_of

NAMED = re.compile(r'class="x"[^>]*><b>([\d,]+)</b>')


@pytest.mark.parametrize(("limit", "is_shown"), [(2048, False), (60, True), (35, True)])
def test_the_axis_has_the_lengths_and_the_cut_only_where_it_is_near(limit: int, is_shown: bool) -> None:
    page = str(lengths_of(Data({}, [], [(27, 27, 10), (28, 30, 1), (31, 35, 2)], limit, "no sample is cut")))
    places = [int(text.replace(",", "")) for text in NAMED.findall(page)]
    assert len(places) >= 3 and min(places) >= 25 and max(places) <= (max(limit, 35) + 3 if is_shown else 38)
    assert ('class="cut"' in page) == is_shown
    assert (f"Dashed: max_seq_length, {limit:,} tokens; " in page) == is_shown
    assert ("Beyond this axis: max_seq_length, 2,048 tokens; no sample is cut." in page) != is_shown
    assert '"row">27<' in page and '"row">31 to 35<' in page
