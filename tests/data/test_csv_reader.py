"""CSV and TSV: what the csv module writes comes out, and what is wrong with a row is reported with its line."""

from __future__ import annotations

import csv
import gzip
import io
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from panda.data.csv_reader import CsvOptions
from panda.data.csv_reader import CsvReader
from panda.data.reading import BadRow
from panda.data.reading import Row
from panda.registry import UserError
from panda.registry.contexts import ReaderContext


def read(file: Path, limit: int = 1 << 20, delimiter: str | None = None) -> list[Row | BadRow]:
    return list(CsvReader(CsvOptions(delimiter), ReaderContext(max_row_bytes=limit)).read(file))


def fields(file: Path, **options: str) -> list[object]:
    rows = read(file, **options)  # type: ignore[arg-type]
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.fields for row in rows if isinstance(row, Row)]


def outcome(file: Path, limit: int = 1 << 20) -> list[object]:
    """Of each row its fields, or its problem."""
    rows = read(file, limit)
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    return [dict(row.fields) if isinstance(row, Row) else row.problem for row in rows]


def write(folder: Path, text: str | bytes, name: str = "a.csv") -> Path:
    content = text if isinstance(text, bytes) else text.encode()
    file = folder / name
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return file


@pytest.mark.parametrize("name", ["a.csv", "a.CSV.gz", "a.tsv", "a.tsv.GZ"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_rows_are_what_the_header_names(tmp_path: Path, name: str, mark: str, newline: str) -> None:
    between = "\t" if "tsv" in name else ","
    lines = ["in,out", 'a,"b, ""c"" 🐼"', "", '"d\ne",', "f,g"]
    text = newline.join(line.replace("in,out", f"in{between}out").replace("a,", f"a{between}") for line in lines)
    text = text.replace('e",', f'e"{between}').replace("f,g", f"f{between}g")
    file = tmp_path / name
    content = (mark + text).encode()
    file.write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    assert fields(file) == [{"in": "a", "out": 'b, "c" 🐼'}, {"in": "d\ne", "out": None}, {"in": "f", "out": "g"}]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=12)


@given(st.lists(st.lists(TEXT, min_size=2, max_size=2).filter(any), min_size=1, max_size=6), st.booleans())
def test_whatever_the_csv_module_writes_comes_out(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], everything: bool
) -> None:
    text = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if everything else csv.QUOTE_MINIMAL
    csv.writer(text, quoting=quoting).writerows([["of header", "b"], *rows])
    file = write(tmp_path_factory.mktemp("any"), text.getvalue())
    assert fields(file) == [{"of header": a or None, "b": b or None} for a, b in rows]


def test_rows_of_other_length_and_repeated_headers_are_bad_rows_with_their_lines(tmp_path: Path) -> None:
    file = write(tmp_path, 'a,b\n1,2\n\n"x\ny",3,4\nonly\na,b\n5,6\n"q"r,7\n8,9\n')
    assert outcome(file) == [
        {"a": "1", "b": "2"},
        "line 4: it has 3 values for 2 fields",
        "line 6: it has 1 value for 2 fields",
        "line 7: it repeats the header",
        {"a": "5", "b": "6"},
        "line 9: not valid CSV: ',' expected after '\"'",
        {"a": "8", "b": "9"},
    ]


def test_a_field_may_be_larger_than_the_csv_module_takes_by_itself(tmp_path: Path) -> None:
    assert fields(write(tmp_path, f"a,b\n{'x' * 500_000},1\n")) == [{"a": "x" * 500_000, "b": "1"}]


@pytest.mark.parametrize("size", [20, 21])
@pytest.mark.parametrize("row", ['"{}",1', '"{}\n",1', "{},1"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_row_above_the_limit_is_reported_and_the_others_are_read(
    tmp_path: Path, size: int, row: str, newline: str
) -> None:
    filled = row.replace("\n", newline).format("x" * (size - len(row.replace("\n", newline)) + 2))
    assert len(filled) == size
    found = outcome(write(tmp_path, newline.join(["a,b", "1,2", filled, "3,4"])), limit=20)
    assert found[0] == {"a": "1", "b": "2"} and found[2:] == [{"a": "3", "b": "4"}]
    if size == 20:
        assert str(found[1]).count("x") > 5
    else:
        assert found[1] == "line 3: it has more than 20 bytes (max_row_bytes)"


def test_a_row_above_the_limit_ends_where_its_quote_does(tmp_path: Path) -> None:
    """Lines within its quotes are no rows, long or short, and quotes that are written twice do not end it."""
    text = 'a\n1\n"{}\n2\n""3""\n{}\n4"\n5\n'.format("x" * 50, '""' * 30)
    found = outcome(write(tmp_path, text), limit=20)
    assert found == [{"a": "1"}, "line 3: it has more than 20 bytes (max_row_bytes)", {"a": "5"}]


def test_a_row_above_the_limit_is_not_held(tmp_path: Path) -> None:
    file = tmp_path / "a.csv.gz"
    with gzip.open(file, "wb", 1) as stream:
        stream.write(b'a,b\n1,2\n"')
        for _ in range(64):
            stream.write(b"0123456789abcde\n" * (1 << 16))
        stream.write(b'",3\n4,5\n')
    tracemalloc.start()
    found = outcome(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == [
        {"a": "1", "b": "2"},
        "line 3: it has more than 1,048,576 bytes (max_row_bytes)",
        {"a": "4", "b": "5"},
    ]
    assert peak < 16 << 20


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "the file is empty"),
        (b"a,b\n", "a header and no rows"),
        (b"a,b,a\n1,2,3\n", "the field 'a' more than once"),
        (b"a;b\n1;2\n", 'write `csv_delimiter: ";"`'),
        (b"a\tb\n1\t2\n", r'write `csv_delimiter: "\\t"`'),
        (b'a,b\n1,2\n3,"4\n5,6\n', r"a\.csv:3: a quote that is opened in this row is never closed"),
        (b'a,b\n1,2\n3,"' + b"4\n5,6\n" * 300, r"a\.csv:3: a quote that is opened in this row is never closed"),
        (b"a,b\n1,caf\xe9\n", r"a\.csv:2: not UTF-8: byte 0xe9"),
        (b'"a"b,c\n1,2\n', "the first row has to name the fields: not valid CSV"),
    ],
)
def test_a_file_that_is_no_table_is_an_error_that_says_why(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read(write(tmp_path, content), limit=1000)


def test_the_delimiter_can_be_given_and_a_column_may_lack_a_name(tmp_path: Path) -> None:
    file = write(tmp_path, ";b\n1;2,3\n")
    assert fields(file, delimiter=";") == [{"column 1": "1", "b": "2,3"}]
    for wrong in ("", ";;", '"', "\n"):
        with pytest.raises(UserError, match="is not one character between columns"):
            CsvOptions(wrong)
