"""The report of the rows that were left out, cut, or have fields that nothing used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from panda.data.reading import BadRow
from panda.data.report import KEPT_FIELDS
from panda.data.report import SHOWN_BAD_ROWS
from panda.data.report import SHOWN_FIELDS
from panda.data.report import DataReport


def test_every_bad_row_is_counted_and_the_first_are_shown() -> None:
    report = DataReport(files=1, rows=40)
    for number in range(1, 31):
        report.add_bad(BadRow(Path("a.json"), number, "no target"))
    assert report.bad_rows == 30
    assert len(report.first_bad_rows) == SHOWN_BAD_ROWS
    numbers = ", ".join(map(str, range(1, SHOWN_BAD_ROWS + 1)))
    assert report.lines() == [
        f"bad row: a.json, rows {numbers}: no target",
        "30 of 40 rows cannot be used and are left out.",
    ]


def test_bad_rows_are_told_with_their_place_and_a_problem_once_where_they_follow_each_other() -> None:
    report = DataReport()
    for file, number, problem in [("a", 1, "x"), ("a", 2, "x"), ("a", 5, "y"), ("a", 6, "x"), ("b", 7, "x")]:
        report.add_bad(BadRow(Path(file), number, problem))
    assert report.first_bad_lines() == ["a, rows 1, 2: x", "a, row 5: y", "a, row 6: x", "b, row 7: x"]


def test_bad_rows_are_counted_by_reason_without_their_numbers() -> None:
    report, other = DataReport(rows=3), DataReport(rows=2)
    report.add_bad(BadRow(Path("a.json"), 1, "not valid JSON at line 17"))
    report.add_bad(BadRow(Path("a.json"), 2, "not valid JSON at line 18"))
    other.add_bad(BadRow(Path("b.json"), 1, "empty"))
    report.add_unused("id", 3)
    other.add_unused("id")
    other.add_unused("messages[].weight")
    report.add(other)
    assert report.unused == {"id": 4, "messages[].weight": 1}
    assert report.reasons == {"not valid JSON at line …": 2, "empty": 1}
    assert (report.rows, report.bad_rows, len(report.first_bad_rows)) == (5, 3, 3)
    assert DataReport.from_json(json.loads(json.dumps(report.as_json()))) == report


def test_the_report_of_faultless_data_is_empty() -> None:
    assert DataReport(files=3, rows=100).lines() == []


def test_unused_fields_are_named_with_their_rows_and_not_without_end() -> None:
    report = DataReport()
    report.add_unused("id", 7473)
    report.add_unused("a\x1b")
    assert report.lines() == ["the field 'id' is not used (7,473 rows)", "the field 'a\\x1b' is not used (1 row)"]
    for number in range(1000):
        report.add_unused(f"key {number}")
    lines = report.lines()
    assert lines[0] == "the field 'id' is not used (7,473 rows)"
    assert len(lines) == SHOWN_FIELDS + 1
    assert lines[-1] == f"at least {KEPT_FIELDS - SHOWN_FIELDS} more fields are not used"
    assert report.unused.total() == 7474 + 1000 and len(report.unused) == KEPT_FIELDS + 1


def test_a_report_is_safe_to_print() -> None:
    report = DataReport(rows=1, notes=["\x1b[2J"])
    report.add_bad(BadRow(Path("a\x07.json"), 1, "role \x1b]0;x\nb"))
    assert report.lines() == [
        "bad row: a\\x07.json, row 1: role \\x1b]0;x\\nb",
        "1 of 1 row cannot be used and is left out.",
        "\\x1b[2J",
    ]


@pytest.mark.parametrize(
    ("truncated", "line"),
    [
        (0, "no sample is cut to 512 tokens"),
        (1, "1 of 7,473 samples (less than 0.1%) is cut to 512 tokens (max_seq_length)"),
        (12, "12 of 7,473 samples (0.2%) are cut to 512 tokens (max_seq_length)"),
    ],
)
def test_cut_samples_are_reported_with_their_share(truncated: int, line: str) -> None:
    report = DataReport(rows=4000, truncated=truncated)
    assert report.cut(7473, 512) == line
    assert report.lines() == []
