"""The ``text`` reader: plain text, a document a file or a line."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from typing import Literal

from panda.data.packed_files import not_utf8
from panda.data.packed_files import open_binary
from panda.data.packed_files import with_packed
from panda.data.reading import BadRow
from panda.data.reading import Row
from panda.data.reading import lines
from panda.data.reading import too_large
from panda.registry import UserError
from panda.registry import register_reader
from panda.registry.contexts import ReaderContext


@dataclass(frozen=True)
class TextOptions:
    """Options of the text reader."""

    text_document: Literal["file", "line"] = "file"
    """What a document is: a whole file, or each line that is not blank."""


@register_reader("text", options=TextOptions)
class TextReader:
    """Plain text in UTF-8, also packed: a file or a line is a row, with the field "text"."""

    suffixes = with_packed(".txt", ".md", ".rst")

    def __init__(self, options: TextOptions, context: ReaderContext) -> None:
        self.document = options.text_document
        self.limit = context.max_row_bytes

    def read(self, file: Path) -> Iterator[Row | BadRow]:
        """Rows in order, numbered by line where a line is a document. Blank text is an error."""
        blank = True
        with open_binary(file) as stream:
            documents = lines(stream, self.limit) if self.document == "line" else _whole(stream, self.limit)
            for number, raw in enumerate(documents, 1):
                if raw is None:
                    blank = False
                    advice = "" if self.document == "line" else ": `text_document: line` makes each line a row"
                    yield BadRow(file, number, too_large(self.limit, advice))
                    continue
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as problem:
                    line = number + raw.count(b"\n", 0, problem.start)
                    raise not_utf8(file, line, raw[problem.start]) from None
                if text.strip():
                    blank = False
                    yield Row({"text": _with_unix_newlines(text.rstrip("\r\n"))}, file, number)
        if blank:
            raise UserError(f"{file}: the file is empty.")


def _whole(stream: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """The content of ``stream``; None, without having read it all, if it has more than ``limit`` bytes."""
    content = stream.read(limit + 1)
    yield content if len(content) <= limit else None


def _with_unix_newlines(text: str) -> str:
    return io.StringIO(text, newline=None).read() if "\r" in text else text
