"""Parquet and Arrow: rows as they were put in, in little memory, and clear words for what is damaged or missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import feather
from pyarrow import ipc
from pyarrow import parquet

from panda.data.parquet_reader import ROWS_AT_ONCE
from panda.data.parquet_reader import ParquetReader
from panda.data.reading import Row
from panda.registry import NoOptions
from panda.registry import UserError
from panda.registry.contexts import ReaderContext

ROWS = [
    {"input": f"in {n} 🐼", "messages": [{"role": "user", "content": str(n)}], "empty": None}
    for n in range(ROWS_AT_ONCE * 2 + 7)
]


def read(file: Path) -> list[Any]:
    return list(ParquetReader(NoOptions(), ReaderContext()).read(file))


def write(file: Path, rows: list[dict[str, Any]], form: str) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    if form == "parquet":
        parquet.write_table(table, file, row_group_size=700)
    elif form == "feather":
        feather.write_feather(table, file)
    else:
        new = ipc.new_file if form == "file" else ipc.new_stream
        with new(str(file), table.schema) as writer:
            writer.write_table(table)
    return file


@pytest.mark.parametrize(
    ("name", "form"), [("a.parquet", "parquet"), ("a.arrow", "file"), ("a.arrow", "stream"), ("a.feather", "feather")]
)
def test_rows_come_out_in_order_as_they_went_in(tmp_path: Path, name: str, form: str) -> None:
    rows = read(write(tmp_path / name, ROWS, form))
    assert [row.fields for row in rows] == ROWS
    assert [row.number for row in rows] == list(range(1, len(ROWS) + 1))
    assert all(isinstance(row, Row) for row in rows)


@pytest.mark.parametrize(("name", "form"), [("a.parquet", "parquet"), ("a.arrow", "file"), ("a.arrow", "stream")])
def test_a_file_that_is_cut_short_is_an_error_that_names_it(tmp_path: Path, name: str, form: str) -> None:
    file = write(tmp_path / name, ROWS, form)
    content = file.read_bytes()
    for kept in (0, 3, 20, len(content) // 2):
        file.write_bytes(content[:kept])
        with pytest.raises(UserError) as error:
            read(file)
        assert str(error.value).startswith(f"{file}: ")


def test_junk_and_a_missing_file_are_errors_that_name_it(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            read(tmp_path / name)
        (tmp_path / name).write_bytes(b"\x00\xffjunk" * 50)
        with pytest.raises(UserError, match=f"{name}: "):
            read(tmp_path / name)


def test_a_table_without_rows_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"input": pyarrow.array([], pyarrow.string())}), file)
    with pytest.raises(UserError, match="the file has no rows"):
        read(file)


def test_without_pyarrow_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"parquet needs pyarrow.*pip install 'panda-train\[data\]'"):
        ParquetReader(NoOptions(), ReaderContext())
