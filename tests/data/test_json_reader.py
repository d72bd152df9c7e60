"""Every shape of JSON that people call a data set, and everything that can be wrong with one."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from panda.data import json_reader
from panda.data.json_reader import JsonReader
from panda.data.reading import BadRow
from panda.data.reading import Row
from panda.registry import NoOptions
from panda.registry import UserError
from panda.registry.contexts import ReaderContext

A, B = {"input": "a", "target": "b"}, {"input": "ç", "target": "日本 🐼"}


def read(file: Path) -> list[Row | BadRow]:
    return list(JsonReader(NoOptions(), ReaderContext()).read(file))


def fields(file: Path) -> list[Any]:
    rows = read(file)
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.fields for row in rows if isinstance(row, Row)]


def bad(file: Path) -> list[tuple[int, str]]:
    return [(row.number, row.problem) for row in read(file) if isinstance(row, BadRow)]


def write(folder: Path, content: str | bytes, name: str = "data.json") -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def lines(*rows: Any, ascii_only: bool = False) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(json.dumps([A, B]), id="array"),
        pytest.param(json.dumps([A, B], indent=2, ensure_ascii=False), id="indented array"),
        pytest.param(f" \n\t[\n{json.dumps(A)}\n,\n{json.dumps(B)}\n]\n\n", id="array with space around"),
        pytest.param(lines(A, B), id="JSON Lines"),
        pytest.param(lines(A, B) + "\n", id="JSON Lines, newline at the end"),
        pytest.param(lines(A, B, ascii_only=True), id="JSON Lines, escaped"),
        pytest.param(f"\n\n{json.dumps(A)}\n\n\n{json.dumps(B)}\n\n", id="JSON Lines, empty lines"),
        pytest.param(json.dumps(A) + json.dumps(B), id="concatenated objects"),
        pytest.param(json.dumps(A, indent=1) + "\n" + json.dumps(B, indent=4), id="indented objects"),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
def test_the_same_rows_come_out_of_every_shape(tmp_path: Path, text: str, newline: str, mark: bytes) -> None:
    file = write(tmp_path, mark + text.replace("\n", newline).encode())
    assert fields(file) == [A, B]


def test_a_single_object_is_one_row(tmp_path: Path) -> None:
    [row] = read(write(tmp_path, json.dumps(A)))
    assert isinstance(row, Row)
    assert row.fields == A
    assert row.number == 1
    assert row.place == f"{tmp_path / 'data.json'}, row 1"


def test_raw_newlines_and_tabs_inside_strings_are_text(tmp_path: Path) -> None:
    text = '{"title": "one\ntwo",\n "content": "\tthree\n\nfour"}\n{"title": "five", "content": "six\n}"}\n'
    expected = [{"title": "one\ntwo", "content": "\tthree\n\nfour"}, {"title": "five", "content": "six\n}"}]
    assert fields(write(tmp_path, text)) == expected
    assert fields(write(tmp_path, "[" + text.replace('"}\n{"', '"},\n{"') + "]")) == expected


def test_the_example_of_instruction_tuning_in_pandallms_documentation_loads(tmp_path: Path) -> None:
    text = (
        '{"input": "Drink plenty of water, exercise regularly, and get enough sleep to stay healthy.",\n'
        '"target": "As an AI language model, I do not have the ability to follow instructions, but I can provide you'
        ' with information related to the given instruction."}'
    )
    [row] = fields(write(tmp_path, text))
    assert row["input"].endswith("stay healthy.")
    assert row["target"].startswith("As an AI language model")


def test_the_example_of_pretraining_in_pandallms_documentation_loads_with_its_raw_newline(tmp_path: Path) -> None:
    text = (
        '{"title": "Singapore lion dance troupe clinches gold at Genting championship, breaking Malaysia\'s 13-year'
        ' winning streak",\n'
        '"content": "Original Title: Singapore lion dance troupe clinches gold at Genting championship, breaking'
        " Malaysia's 13-year winning streak\n"
        "The winning team from Singapore Yiwei Athletic Association impressed judges. The triumph caps a string of"
        ' wins. A team won the first Prime Ministerâ€™s Cup, taking home the top prize of RM38,000 (US$8,300)."}'
    )
    [row] = fields(write(tmp_path, text))
    assert "winning streak\nThe winning team" in row["content"]
    assert "Ministerâ€™s Cup" in row["content"]


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3), min_size=1, max_size=5))
def test_any_text_comes_out_of_an_array_and_of_lines_as_it_went_in(tmp_path_factory, rows) -> None:
    folder = tmp_path_factory.mktemp("any")
    assert fields(write(folder, json.dumps(rows, ensure_ascii=False))) == rows
    assert fields(write(folder, lines(*rows))) == rows
    assert fields(write(folder, lines(*rows, ascii_only=True))) == rows


@pytest.mark.parametrize(
    ("element", "kind"),
    [
        ("[1]", "an array"),
        ('"x"', "a string"),
        ("1", "a number"),
        ("1.5", "a number"),
        ("true", "a boolean"),
        ("null", "null"),
    ],
)
def test_an_element_that_is_no_object_is_a_bad_row_that_says_what_it_is(
    tmp_path: Path, element: str, kind: str
) -> None:
    array = write(tmp_path, f"[{json.dumps(A)}, {element}, {json.dumps(B)}]")
    sequence = write(tmp_path, f"{json.dumps(A)}\n{element}\n{json.dumps(B)}\n", "data.jsonl")
    for file in (array, sequence):
        good = [(row.number, row.fields) for row in read(file) if isinstance(row, Row)]
        assert good == [(1, A), (3, B)]
        assert bad(file) == [(2, f"expected an object, {{...}}, found {kind}")]


@pytest.mark.parametrize(
    "broken",
    [
        '{"input": "a", "target": "b"',
        '{"input": "a", "target": "b',
        '{"input": "a", "target": }',
        '{"input": "a" "target": "b"}',
        '{"input": "a, "target": "b"}',
        '{"input": "a", "target": "b",',
        '{input: "a", "target": "b"}',
        "{'input': 'a', 'target': 'b'}",
        '"input": "a", "target": "b"}',
        '{"input": "a", "target": "\\x"}',
        "{",
        "}",
        "garbage",
        "nullify",
        "# a comment",
    ],
)
@pytest.mark.parametrize("place", [1, 2, 3], ids=["first", "middle", "last"])
def test_a_broken_line_costs_exactly_one_row_and_is_reported(tmp_path: Path, broken: str, place: int) -> None:
    content = [json.dumps(A), json.dumps(B)]
    content.insert(place - 1, broken)
    file = write(tmp_path, "\n".join(content) + "\n", "data.jsonl")
    assert [row.fields for row in read(file) if isinstance(row, Row)] == [A, B]
    [(number, problem)] = bad(file)
    assert number == place
    assert "not valid JSON at line " in problem


def test_a_broken_array_between_the_lines_costs_one_row(tmp_path: Path) -> None:
    file = write(tmp_path, f"{json.dumps(A)}\n[1, 2\n{json.dumps(B)}\n")
    assert [row.fields for row in read(file) if isinstance(row, Row)] == [A, B]
    assert [number for number, _ in bad(file)] == [2]


def test_each_of_several_broken_lines_in_a_row_is_reported(tmp_path: Path) -> None:
    file = write(tmp_path, f'{json.dumps(A)}\nwords\nmore words\n{{"input": 1,}}\n{{"target" 2}}\n{json.dumps(B)}\n')
    assert [number for number, _ in bad(file)] == [2, 3, 4, 5]
    assert [row.number for row in read(file) if isinstance(row, Row)] == [1, 6]


def test_an_indented_line_behind_a_broken_one_is_not_lost(tmp_path: Path) -> None:
    file = write(tmp_path, f'  {{"input": "a",}}\n  {json.dumps(A)}\n  {json.dumps(B)}\n')
    assert [row.fields for row in read(file) if isinstance(row, Row)] == [A, B]
    assert [number for number, _ in bad(file)] == [1]


def test_text_behind_an_object_on_its_line_is_reported(tmp_path: Path) -> None:
    file = write(tmp_path, f"{json.dumps(A)} trailing\n{json.dumps(B)}\n")
    assert [row.fields for row in read(file) if isinstance(row, Row)] == [A, B]
    assert [number for number, _ in bad(file)] == [2]


def test_a_number_that_python_refuses_to_read_is_a_bad_row(tmp_path: Path) -> None:
    huge = f'{{"input": {"9" * 5000}}}'
    file = write(tmp_path, f"{huge}\n{json.dumps(A)}\n")
    assert [row.fields for row in read(file) if isinstance(row, Row)] == [A]
    assert [number for number, _ in bad(file)] == [1]


@pytest.mark.parametrize("cut", [1, 5, 20, 32, 34, 40, 60])
def test_a_truncated_array_is_an_error_that_says_where(tmp_path: Path, cut: int) -> None:
    whole = f"[\n{json.dumps(A)},\n{json.dumps(A)},\n{json.dumps(A)}\n]\n"
    text = whole[:cut]
    file = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        read(file)
    place, line, _column = str(error.value).split(": not valid JSON")[0].rsplit(":", 2)
    assert place == str(file)
    assert int(line) == text.rstrip("\n").count("\n") + 1 or text.endswith("\n")
    assert "is it cut short?" in str(error.value)


@pytest.mark.parametrize(
    ("text", "line", "row"),
    [
        (f'[\n{json.dumps(A)},\n{{"input": }}\n]', 3, 2),
        (f"[\n{json.dumps(A)}\n{json.dumps(B)}\n]", 3, 1),
        (f"[\n{json.dumps(A)},\n,\n{json.dumps(B)}]", 3, 2),
        ("[abc]", 1, 1),
    ],
)
def test_a_syntax_error_inside_an_array_is_an_error_that_says_where(
    tmp_path: Path, text: str, line: int, row: int
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        read(file)
    assert str(error.value).startswith(f"{file}:{line}:")
    assert f"in row {row}: " in str(error.value)
    assert "cut short" not in str(error.value)


def test_text_behind_an_array_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"text after the array's closing '\]': '\[{"):
        read(write(tmp_path, json.dumps([A]) + "\n" + json.dumps([B])))


@pytest.mark.parametrize("content", [b"", b" \n\r\n\t ", b"\xef\xbb\xbf"], ids=["nothing", "space", "BOM"])
def test_an_empty_file_is_an_error_that_says_so(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match=r"data\.json: the file is empty\. Expected a JSON array"):
        read(write(tmp_path, content))


def test_an_empty_array_has_no_rows(tmp_path: Path) -> None:
    assert read(write(tmp_path, "[]")) == []


@pytest.mark.parametrize(
    ("content", "byte", "line"),
    [
        (b'[\n{"input": "caf\xe9"}]', "0xe9", 2),
        (b'\xef\xbb\xbf[\r\n\r\n{"input": "caf\xe9"}]', "0xe9", 3),
        ('{"input": "a"}'.encode("utf-16"), "0xff", 1),
    ],
    ids=["Latin-1", "Latin-1 behind a BOM", "UTF-16"],
)
def test_a_file_that_is_not_utf_8_is_an_error_that_says_where(
    tmp_path: Path, content: bytes, byte: str, line: int
) -> None:
    file = write(tmp_path, content)
    with pytest.raises(UserError) as error:
        read(file)
    assert str(error.value).startswith(f"{file}:{line}: not UTF-8: byte {byte}. ")
    assert "Convert the file to UTF-8." in str(error.value) or "It begins as" in str(error.value)


@given(st.binary(min_size=1, max_size=60))
def test_binary_junk_is_reported_and_never_crashes(tmp_path_factory, junk: bytes) -> None:
    file = write(tmp_path_factory.mktemp("junk"), junk)
    try:
        rows = read(file)
    except UserError as error:
        assert str(file) in str(error)
    else:
        assert [row.number for row in rows] == list(range(1, len(rows) + 1))


@given(st.text(alphabet='{}[]",:\\ \nan1', min_size=1, max_size=40))
def test_text_that_is_nearly_json_is_reported_and_never_crashes(tmp_path_factory, text: str) -> None:
    file = write(tmp_path_factory.mktemp("nearly"), text)
    try:
        rows = read(file)
    except UserError as error:
        assert str(file) in str(error)
    else:
        assert [row.number for row in rows] == list(range(1, len(rows) + 1))


def test_deep_nesting_is_reported_and_never_crashes(tmp_path: Path) -> None:
    deep = '{"input": ' + "[" * 200_000
    assert [number for number, _ in bad(write(tmp_path, deep))] == [1]
    with pytest.raises(UserError, match="not valid JSON, in row 1"):
        read(write(tmp_path, "[" + deep))


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "missing.json")


# -- files that do not fit in memory ----------------------------------------------------------


NOT_QUITE = [
    f"[\n{json.dumps(A)},\n {json.dumps(B, indent=1)}\n]\n",
    f'{json.dumps(A)}\n12345\n{{"input": "a" "b"}}\nwords\n  {json.dumps(B, ensure_ascii=False)}\n[1,\n2]\n',
    f'[{json.dumps(A)},\n\n{{"input": tru}}]',
    f"[{json.dumps(A)},\n{json.dumps(B)[:-4]}",
    f"[{json.dumps(A)}]\n\n rest",
    '{"a": 1.25e+10, "b": [true, null, -Infinity], "c": "\\ud83d\\ude00"}\n' * 3,
    '1 1\n1 \t\r\n"a"   ',
    f'{{"a"\n"b"\n\n\n{json.dumps(A)}\n-12.5e3\n\n{json.dumps(B)}',
]


def everything(file: Path) -> Any:
    """Rows and bad rows with their places, or the error."""
    try:
        return [(row.number, row.fields if isinstance(row, Row) else row.problem) for row in read(file)]
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("text", NOT_QUITE)
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_what_is_read_does_not_depend_on_how_much_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, newline: str
) -> None:
    """A window of a few bytes ends inside words, numbers, escapes, characters and rows."""
    file = write(tmp_path, text.replace("\n", newline))
    at_once = everything(file)
    for window in (1, 2, 3, 5, 16, 64):
        monkeypatch.setattr(json_reader, "WINDOW", window)
        assert everything(file) == at_once, window


@given(st.text(alphabet='{}[]",:\\ \nan1é', min_size=1, max_size=40), st.integers(1, 9))
def test_nearly_json_is_the_same_in_any_window(tmp_path_factory, text: str, window: int) -> None:
    file = write(tmp_path_factory.mktemp("nearly"), text)
    at_once = everything(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_reader, "WINDOW", window)
        assert everything(file) == at_once


def test_the_place_of_a_byte_that_is_not_utf_8_is_found_in_a_later_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, (json.dumps(A) + "\n").encode() * 20 + b"\xff")
    monkeypatch.setattr(json_reader, "WINDOW", 7)
    with pytest.raises(UserError, match=r"data\.json:21: not UTF-8: byte 0xff"):
        read(file)


@pytest.mark.parametrize("shape", ["lines", "array"])
def test_a_large_file_is_read_with_little_memory(tmp_path: Path, shape: str) -> None:
    rows = [json.dumps({"input": "x" * 500, "target": str(number)}) for number in range(40_000)]
    file = write(tmp_path, "\n".join(rows) if shape == "lines" else "[" + ",\n".join(rows) + "]")
    del rows
    assert file.stat().st_size > 20_000_000
    reader = JsonReader(NoOptions(), ReaderContext())
    tracemalloc.start()
    try:
        count = sum(isinstance(row, Row) for row in reader.read(file))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 40_000
    assert peak < 8_000_000


def test_a_single_line_of_ten_megabytes_is_one_row(tmp_path: Path) -> None:
    long = "word " * 2_000_000
    file = write(tmp_path, lines({"input": "a", "target": long}, A), "data.jsonl")
    assert fields(file) == [{"input": "a", "target": long}, A]


def test_a_gzipped_file_is_read_as_what_is_in_it(tmp_path: Path) -> None:
    for name, text in (("a.json.gz", json.dumps([A, B])), ("a.jsonl.gz", lines(A, B))):
        assert fields(write(tmp_path, gzip.compress(text.encode()), name)) == [A, B]


def test_a_gzipped_file_that_is_cut_short_or_is_none_is_an_error(tmp_path: Path) -> None:
    whole = gzip.compress(lines(A, B).encode())
    for content in (whole[:-20], b"{}", whole[:12] + b"\xff" * 9):
        with pytest.raises(UserError, match=r"data\.jsonl\.gz: (not a complete gzip file: .* Is it cut|its name is)"):
            read(write(tmp_path, content, "data.jsonl.gz"))


# -- rows above max_row_bytes ---------------------------------------------------------------------

TOO_LARGE = "it has more than 40 bytes (max_row_bytes)"


def outcome(file: Path, limit: int = 40) -> list[Any]:
    """Of each row its fields, or its problem."""
    rows = list(JsonReader(NoOptions(), ReaderContext(max_row_bytes=limit)).read(file))
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    return [row.fields if isinstance(row, Row) else row.problem for row in rows]


@pytest.mark.parametrize("window", [1, 3, 16, 64, 1 << 20])
@pytest.mark.parametrize("shape", ["lines", "array", "indented array", "lines without newlines"])
@pytest.mark.parametrize("character", ["x", "é", "🐼", '"', "\\", "{", "[", "]", "}", "\n"])
def test_a_row_of_as_many_bytes_as_allowed_is_a_row_and_of_one_more_a_bad_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, shape: str, character: str
) -> None:
    monkeypatch.setattr(json_reader, "WINDOW", window)
    for size in (40, 41, 200):
        row = {"a": character * 7}
        room = size - len(json.dumps(row, ensure_ascii=False).encode())
        row = {"a": character * 7 + "." * room}
        written = [json.dumps(each, ensure_ascii=False) for each in (A, row, row, A)]
        text = {
            "lines": "\n".join(written),
            "array": f"[{','.join(written)}]",
            "indented array": "[\n  " + ",\n  ".join(written) + "\n]\n",
            "lines without newlines": "".join(written),
        }[shape]
        expected = [A, *[row if size == 40 else TOO_LARGE] * 2, A]
        if shape == "lines without newlines" and size > 40:
            expected = [A, TOO_LARGE]  # what stands on its line goes with it
        assert outcome(write(tmp_path, text)) == expected


@pytest.mark.parametrize("window", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": "' + "x" * 90 + '\n{"b": 1}\n', [TOO_LARGE, {"b": 1}]),
        ('{"b": 1}\n{"a": [\n  {"c": "' + "x" * 90 + '"},\n  {"d": 1}\n]}\n{"b": 2}', [{"b": 1}, TOO_LARGE, {"b": 2}]),
        ('"' + "x" * 90, [TOO_LARGE]),
        ("1" * 90 + '\n{"b": 1}', [TOO_LARGE, {"b": 1}]),
        (
            "[" + "1" * 90 + ', {"b": 1}, "' + "x" * 90 + '", [' + "1, " * 90 + "1]]",
            [TOO_LARGE, {"b": 1}, *[TOO_LARGE] * 2],
        ),
        ('[{"a": {"b": [1, "]}"], "c": "' + '\\"' * 90 + '"}}]', [TOO_LARGE]),
    ],
)
def test_a_row_above_the_limit_is_passed_over_whatever_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, text: str, expected: list[Any]
) -> None:
    monkeypatch.setattr(json_reader, "WINDOW", window)
    assert outcome(write(tmp_path, text)) == expected


@pytest.mark.parametrize("text", ['[{"a": "' + "x" * 90, '[{"a": "' + "x" * 90 + '"', "[" + "1" * 90, '["' + "\\" * 90])
def test_an_array_that_ends_within_a_row_above_the_limit_is_cut_short(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"not valid JSON, in row 1: .* is it cut short"):
        outcome(write(tmp_path, text))


@given(
    st.lists(st.dictionaries(st.text(max_size=4), st.text('x"\\{}[], \n', max_size=30), max_size=3), min_size=1),
    st.integers(1, 99),
)
def test_of_an_array_and_of_lines_the_same_rows_are_left_out(tmp_path_factory, rows: list[Any], window: int) -> None:
    folder = tmp_path_factory.mktemp("any")
    expected = [row if len(json.dumps(row, ensure_ascii=False).encode()) <= 40 else TOO_LARGE for row in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_reader, "WINDOW", window)
        assert outcome(write(folder, json.dumps(rows, ensure_ascii=False))) == expected
        assert outcome(write(folder, lines(*rows))) == expected


@pytest.mark.parametrize("shape", ['{{"a": "{}"}}\n{}', '[{{"a": "{}"}}, {}]', '"{}"\n{}', "{}\n{}"])
def test_a_row_above_the_limit_is_not_held(tmp_path: Path, shape: str) -> None:
    begin, end = shape.format("|", json.dumps(A)).split("|")
    file = tmp_path / "a.jsonl.gz"
    with gzip.open(file, "wb", 1) as stream:
        stream.write(begin.encode())
        for _ in range(96):
            stream.write(b"x" * (1 << 20))
        stream.write(end.encode())
    tracemalloc.start()
    found = outcome(file, 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert found[1:] == [A] and isinstance(found[0], str)


# -- what is JSON, and still not a row ----------------------------------------------------------------

STILL_NOT_A_ROW = {
    "nested": ('{"input": ' + "[" * 10_000 + "]" * 10_000 + "}", "it is nested too deeply to be read"),
    "objects": ('{"input": ' * 10_000 + "1" + "}" * 10_000, "it is nested too deeply to be read"),
    "digits": ('{"input": ' + "9" * 5000 + "}", "it has a whole number of more than 4,300 digits"),
    "twice": ('{"input": "a", "x": [{"b": 1, "b": 2}]}', "it has 'b' twice, with two values"),
    "twice at the top": ('{"input": "a", "input": "b"}', "it has 'input' twice, with two values"),
}


@pytest.mark.parametrize("kind", STILL_NOT_A_ROW)
@pytest.mark.parametrize("shape", ["{0}\n{1}\n{0}\n", "[{0},\n{1}, {0}]", "[{0},{1},{0}]"])
def test_valid_json_that_cannot_be_a_row_costs_that_row_in_any_file(tmp_path: Path, kind: str, shape: str) -> None:
    row, problem = STILL_NOT_A_ROW[kind]
    file = write(tmp_path, shape.format(json.dumps(A), row))
    assert outcome(file, 1 << 20) == [A, problem, A]


def test_objects_of_one_line_are_read_after_one_that_has_a_field_twice(tmp_path: Path) -> None:
    file = write(tmp_path, '{"a": 1, "a": 2}{"b": 1}{"a": 1, "a": 1}')
    assert outcome(file) == ["it has 'a' twice, with two values", {"b": 1}, {"a": 1}]
