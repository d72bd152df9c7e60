"""Plain text: a document a file or a line."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from panda.data.reading import BadRow
from panda.data.text_reader import TextOptions
from panda.data.text_reader import TextReader
from panda.registry import UserError
from panda.registry.contexts import ReaderContext


def read(file: Path, document: Any) -> list[Any]:
    return list(TextReader(TextOptions(document), ReaderContext()).read(file))


def write(folder: Path, content: bytes, name: str = "a.txt") -> Path:
    file = folder / name
    file.write_bytes(content)
    return file


def test_a_file_is_one_document(tmp_path: Path) -> None:
    file = write(tmp_path, "\ufeffone\r\n\r\n two é\r\n".encode())
    [row] = read(file, "file")
    assert (row.fields, row.number) == ({"text": "one\n\n two é"}, 1)


def test_a_line_is_one_document_and_blank_ones_are_none(tmp_path: Path) -> None:
    content = "\ufeffone\n\n  \n\ttwo 🐼\r\nthree".encode()
    for file in (write(tmp_path, content), write(tmp_path, gzip.compress(content), "a.txt.gz")):
        rows = read(file, "line")
        assert [(row.number, row.fields["text"]) for row in rows] == [(1, "one"), (4, "\ttwo 🐼"), (5, "three")]


@pytest.mark.parametrize("document", ["file", "line"])
def test_what_cannot_be_read_is_an_error_that_says_where(tmp_path: Path, document: str) -> None:
    with pytest.raises(UserError, match=r"a\.txt:2: not UTF-8: byte 0xe9"):
        read(write(tmp_path, b"one\ncaf\xe9\n"), document)
    with pytest.raises(UserError, match=r"a\.txt: the file is empty"):
        read(write(tmp_path, b" \n\n"), document)
    with pytest.raises(UserError, match=r"b\.txt: cannot be read"):
        read(tmp_path / "b.txt", document)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_row_above_the_limit_is_a_bad_row_and_is_not_held(tmp_path: Path, name: str) -> None:
    content = b"one\n" + b"x" * (64 << 20) + b"\r\n" + "é".encode() * 500 + b"\r\nthree\n" + b"y" * 1001
    file = write(tmp_path, gzip.compress(content, 1) if name.endswith("gz") else content, name)
    tracemalloc.start()
    by_line = list(TextReader(TextOptions("line"), ReaderContext(max_row_bytes=1000)).read(file))
    [whole] = TextReader(TextOptions("file"), ReaderContext(max_row_bytes=1000)).read(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [(row.number, isinstance(row, BadRow)) for row in by_line] == [
        (1, False),
        (2, True),
        (3, False),
        (4, False),
        (5, True),
    ]
    assert str(by_line[1]).endswith("row 2: it has more than 1,000 bytes (max_row_bytes)")
    assert str(whole).endswith("(max_row_bytes): `text_document: line` makes each line a row")
    assert peak < 8 << 20
    exact = write(tmp_path, b"x" * 1000, "b.txt")
    [row] = TextReader(TextOptions("file"), ReaderContext(max_row_bytes=1000)).read(exact)
    assert len(row.fields["text"]) == 1000  # type: ignore[union-attr]
