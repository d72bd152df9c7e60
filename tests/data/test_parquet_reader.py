"""Parquet and Arrow: rows as they were put in, in little memory, and clear words for what is damaged or missing."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import compute
from pyarrow import feather
from pyarrow import ipc
from pyarrow import parquet

from panda.data import arrow_arrays
from panda.data import parquet_reader
from panda.data.parquet_reader import ROWS_AT_ONCE
from panda.data.parquet_reader import ParquetReader
from panda.data.parquet_reader import _batches
from panda.data.parquet_reader import _Columns
from panda.data.parquet_reader import _parts
from panda.data.reading import BadRow
from panda.data.reading import Fields
from panda.data.reading import Row
from panda.data.reading import kind_of
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


# -- types ------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
LEAVES = [
    (pyarrow.string(), TEXT),
    (pyarrow.large_string(), TEXT),
    (pyarrow.string_view(), TEXT),
    (pyarrow.int16(), st.integers(-(2**15), 2**15 - 1)),
    (pyarrow.uint64(), st.integers(0, 2**64 - 1)),
    (pyarrow.float64(), st.floats(allow_nan=False)),
    (pyarrow.bool_(), st.booleans()),
    (pyarrow.null(), st.none()),
]


def columns(depth: int) -> st.SearchStrategy[tuple[pyarrow.DataType, st.SearchStrategy[object]]]:
    """A type and its values, lists, maps and structs of others among them."""

    def nullable(of: object) -> tuple[Any, Any]:
        kind, values = of  # type: ignore[misc]
        return kind, st.none() | values

    leaf = st.sampled_from(LEAVES).map(nullable)
    if depth == 0:
        return leaf
    inner = columns(depth - 1)
    return st.one_of(
        leaf,
        inner.map(lambda of: (pyarrow.list_(of[0]), st.none() | st.lists(of[1], max_size=3))),
        inner.map(lambda of: (pyarrow.large_list(of[0]), st.none() | st.lists(of[1], max_size=3))),
        inner.map(lambda of: (pyarrow.list_view(of[0]), st.none() | st.lists(of[1], max_size=3))),
        inner.map(lambda of: (pyarrow.list_(of[0], 2), st.none() | st.lists(of[1], min_size=2, max_size=2))),
        inner.map(
            lambda of: (pyarrow.map_(pyarrow.string(), of[0]), st.none() | st.dictionaries(TEXT, of[1], max_size=3))
        ),
        st.tuples(inner, inner).map(
            lambda two: (
                pyarrow.struct([("a", two[0][0]), ("b", two[1][0])]),
                st.none() | st.fixed_dictionaries({"a": two[0][1], "b": two[1][1]}),
            )
        ),
    )


@given(st.data())
def test_values_of_any_type_are_those_that_pyarrow_makes(data: st.DataObject) -> None:
    kind, values = data.draw(columns(2))
    expected = data.draw(st.lists(values, min_size=1, max_size=8))
    array = pyarrow.array(expected, kind)
    assert arrow_arrays.values(array) == array.to_pylist(maps_as_pydicts="lossy") == expected
    assert arrow_arrays.values(array.slice(len(expected))) == []
    start = data.draw(st.integers(0, len(expected) - 1))
    assert arrow_arrays.values(array.slice(start)) == expected[start:]
    batch = pyarrow.RecordBatch.from_arrays([array.slice(start)], ["x"])
    [column] = pickle.loads(pickle.dumps([_Columns(batch, 1)]))
    assert column.values("x") == expected[start:]
    for size, value in zip(arrow_arrays.sizes(array.slice(start)).tolist(), expected[start:], strict=True):
        texts, others = counted(value)
        assert texts <= size <= texts + 36 * others


def counted(value: object) -> tuple[int, int]:
    """Bytes of texts in a value, and the number of all else, names of fields among it: of 36 bytes at most."""
    if isinstance(value, str):
        return len(value.encode()), 0
    if isinstance(value, dict):
        value = [*map(bool, value), *value.values()]
    if not isinstance(value, list):
        return 0, 1
    texts, others = zip((0, 0), *map(counted, value), strict=True)
    return sum(texts), sum(others)


OTHERS = {
    "timestamp[ns]": pyarrow.array([1, None], pyarrow.timestamp("ns")),
    "timestamp[us, tz=Europe/Nowhere]": pyarrow.array([1, None], pyarrow.timestamp("us", "Europe/Nowhere")),
    "date64[ms]": pyarrow.array([86_400_000 * 10**8, None], pyarrow.date64()),
    "duration[ns]": pyarrow.array([1, None], pyarrow.duration("ns")),
    "time64[ns]": pyarrow.array([1, None], pyarrow.time64("ns")),
    "month_day_nano_interval": pyarrow.array([(1, 2, 3), None], pyarrow.month_day_nano_interval()),
    "decimal128(38, 2)": pyarrow.array([1, None], pyarrow.decimal128(38, 2)),
    "binary": pyarrow.array([b"\xff", None]),
    "fixed_size_binary[2]": pyarrow.array([b"ab", None], pyarrow.binary(2)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_column_that_json_has_no_kind_for_is_an_unused_field_and_no_error(tmp_path: Path, kind: str) -> None:
    column = OTHERS[kind]
    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, 2, 2], pyarrow.int32()), column)
    table = pyarrow.table({"input": ["a", "b"], "x": column, "in a list": lists})
    feather.write_feather(table, tmp_path / "a.feather")
    first, second = (Fields(row.fields) for row in read(tmp_path / "a.feather"))
    assert (first["input"], second["input"]) == ("a", "b")
    assert (first.unused(), second.unused()) == (["x", "in a list"], ["in a list"])
    assert kind_of(first["x"]) == f"a value of type {kind}" and second["x"] is None
    assert [kind_of(each) for each in first["in a list"]] == [f"a value of type {kind}", "null"]


def test_dictionaries_and_extension_types_are_what_they_are_made_of(tmp_path: Path) -> None:
    words = pyarrow.array(["a", None, "b", "a"])
    table = pyarrow.table(
        {
            "words": words.dictionary_encode(),
            "runs": compute.run_end_encode(words),
            "json": pyarrow.ExtensionArray.from_storage(pyarrow.json_(), words),
        }
    )
    with ipc.new_file(str(tmp_path / "a.feather"), table.schema) as writer:
        writer.write_table(table)
    rows = pickle.loads(pickle.dumps(read(tmp_path / "a.feather")[1:3]))
    assert [dict(row.fields) for row in rows] == [
        dict.fromkeys(("words", "runs", "json"), value) for value in (None, "b")
    ]


def test_a_column_that_nothing_asks_for_is_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where the rows go to another process, which gets those rows and not all of a file's batch."""
    converted = []
    monkeypatch.setattr(
        arrow_arrays, "values", lambda array: converted.extend([array.type] * bool(array)) or array.to_pylist()
    )
    rows = read(write(tmp_path / "a.arrow", ROWS, "file"))
    fields = [Fields(row.fields) for row in rows]
    assert [each.unused() for each in fields] == [["input", "messages"]] * len(ROWS)
    assert all(each.has("input") and "empty" in each and len(each) == 3 and not each.has("empty") for each in fields)
    assert converted == []
    assert [each["input"] for each in fields] == [row["input"] for row in ROWS]
    assert converted == [pyarrow.string()] * 3
    assert len(pickle.dumps(rows[:1])) < len(pickle.dumps(rows)) / 2


def test_two_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["x", "x"])
    with ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="more than one column is called 'x'"):
        read(tmp_path / "a.arrow")


def test_parquet_is_known_by_what_it_is(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", ROWS[:2], "parquet")
    assert [row.fields for row in read(file.rename(tmp_path / "5f70bf18a086"))] == ROWS[:2]


# -- what is too large, and what is damaged -----------------------------------------------------------


@pytest.mark.parametrize(("name", "form"), [("a.parquet", "parquet"), ("a.arrow", "file"), ("a.feather", "feather")])
def test_a_row_above_the_limit_is_a_bad_row_and_the_others_are_read(tmp_path: Path, name: str, form: str) -> None:
    rows = [*ROWS[:5], {"input": "x" * 5000}, *ROWS[5:1500], {"messages": [{"role": "y" * 5000}]}, *ROWS[:3]]
    file = write(tmp_path / name, rows, form)
    found = list(ParquetReader(NoOptions(), ReaderContext(max_row_bytes=4000)).read(file))
    assert [row.number for row in found] == list(range(1, len(rows) + 1))
    bad = {row.number: row.problem for row in found if isinstance(row, BadRow)}
    assert bad == dict.fromkeys((6, 1502), "it has more than 4,000 bytes (max_row_bytes)")
    assert [row.fields["input"] for row in found if isinstance(row, Row)] == [
        row["input"] for number, row in enumerate(rows, 1) if number not in bad
    ]


def test_a_large_dictionary_does_not_count_for_each_row(tmp_path: Path) -> None:
    words = pyarrow.array([f"{number:0500}" for number in range(100)]).dictionary_encode()
    feather.write_feather(pyarrow.table({"input": words}), tmp_path / "a.feather")
    found = list(ParquetReader(NoOptions(), ReaderContext(max_row_bytes=600)).read(tmp_path / "a.feather"))
    assert sum(isinstance(row, Row) for row in found) == 100


VIEWS = {
    "string_view": [f"{number:04000}" for number in range(10)],
    "binary_view": [b"\xff" * 4000] * 10,
    "list_view<item: int64>": [[number] * 500 for number in range(10)],
}


@pytest.mark.parametrize("kind", VIEWS)
def test_what_views_share_does_not_count_for_each_row(tmp_path: Path, kind: str) -> None:
    """Polars writes texts so: any part of an array has all of its bytes."""
    array = pyarrow.array(VIEWS[kind], pyarrow.list_view(pyarrow.int64()) if "list" in kind else kind)
    batch = pyarrow.RecordBatch.from_arrays([array, array], ["input", "x"])
    parts = list(_parts(batch, 16_000))
    assert [part and (part.batch.num_rows, part.size) for part in parts] == [(2, 8000)] * 5
    assert list(_parts(batch, 7999)) == [None] * 10


@pytest.mark.parametrize("form", ["parquet", "file"])
def test_a_text_that_is_stored_once_for_many_rows_is_held_once(tmp_path: Path, form: str) -> None:
    """A file of some kilobytes would be gigabytes in memory otherwise, and all rows one block to tokenise."""
    text = "0123456789" * 10_000
    table = pyarrow.table(
        {
            "input": pyarrow.array([text] * 900).dictionary_encode(),
            "messages": pyarrow.array([[{"role": "user", "content": text}]] * 900),
            "number": pyarrow.array([1] * 900, pyarrow.decimal128(4)),
        }
    )
    file = tmp_path / f"a.{form}"
    if form == "parquet":
        parquet.write_table(table, file)
        assert max(batch.nbytes for batch in _batches(file)) < 3 * len(text)
    else:
        with ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table)
    rows = read(file)
    assert {row.fields.size // len(text) for row in rows} == {2}
    assert len(pickle.dumps(rows[0])) < 83 * 3 * len(text), "a part has 16 MiB"
    assert len({id(row.fields["input"]) for row in rows}) < 20
    assert rows[-1].fields["messages"] == [{"role": "user", "content": text}]


def test_a_large_dictionary_is_not_held_by_rows_that_do_not_use_it(tmp_path: Path) -> None:
    texts = ["a" * (1 << 20), "b", "c"]
    words = pyarrow.DictionaryArray.from_arrays([1, 2] * 50 + [0], texts)
    batch = pyarrow.RecordBatch.from_arrays([words], ["input"])
    parts = list(_parts(batch, 1 << 19))
    assert [part and part.batch.nbytes < 5000 for part in parts] == [True, None]
    assert parts[0] is not None and parts[0].values("input") == ["b", "c"] * 50


def test_a_parquet_column_that_may_have_a_large_dictionary_is_read_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch, of a row, would have all of it."""
    monkeypatch.setattr(parquet_reader, "LARGEST_DICTIONARY", 1 << 16)
    rows = [*ROWS[:5], {"input": "x" * (1 << 17)}, *ROWS[5:10]]
    kinds = [batch.schema.field("input").type for batch in _batches(write(tmp_path / "a.parquet", rows, "parquet"))]
    assert set(kinds) == {pyarrow.string()}


FLIPPING = """
import sys
from pathlib import Path
from panda.data.parquet_reader import ParquetReader
from panda.registry import NoOptions, UserError
from panda.registry.contexts import ReaderContext

file, step = Path(sys.argv[1]), int(sys.argv[2])
content = file.read_bytes()
outcomes = {"read": 0, "refused": 0}
for bit in range(step // 2, len(content) * 8, step):
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    file.write_bytes(damaged)
    try:
        for row in ParquetReader(NoOptions(), ReaderContext()).read(file):
            getattr(row, "fields", {}).items()
        outcomes["read"] += 1
    except UserError:
        outcomes["refused"] += 1
print(outcomes["read"], outcomes["refused"])
"""


@pytest.mark.parametrize(
    ("name", "form"), [("a.parquet", "parquet"), ("a.arrow", "file"), ("b.arrow", "stream"), ("a.feather", "feather")]
)
def test_no_flipped_bit_ends_the_process(tmp_path: Path, name: str, form: str) -> None:
    """In a process of its own, since it would be a segmentation fault."""
    file = write(tmp_path / name, ROWS[:20], form)
    step = max(1, file.stat().st_size * 8 // 500) | 1
    done = subprocess.run(
        [sys.executable, "-c", FLIPPING, file, str(step)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    whole, refused = map(int, done.stdout.split())
    assert whole + refused > 300 and refused > 50
