"""The ``text`` reader: plain text, a document a file or a line."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from panda.data.reading import BadRow
from panda.data.reading import Row
from panda.data.reading import open_binary
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
    """Plain text in UTF-8, also gzipped: a file or a line is a row, with the field "text"."""

    suffixes = (".txt", ".md", ".rst", ".txt.gz", ".md.gz", ".rst.gz")

    def __init__(self, options: TextOptions, context: ReaderContext) -> None:
        self.document = options.text_document

    def read(self, file: Path) -> Iterator[Row | BadRow]:
        """Rows in order, numbered by line where a line is a document. Blank text is an error."""
        blank = True
        with open_binary(file) as stream:
            numbered = enumerate(stream, 1) if self.document == "line" else [(1, stream.read())]
            for number, raw in numbered:
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as problem:
                    line = number + raw.count(b"\n", 0, problem.start)
                    byte = raw[problem.start]
                    raise UserError(f"{file}:{line}: not UTF-8: byte {byte:#04x}. Convert the file to UTF-8.") from None
                if text.strip():
                    blank = False
                    yield Row({"text": _with_unix_newlines(text.rstrip("\r\n"))}, file, number)
        if blank:
            raise UserError(f"{file}: the file is empty.")


def _with_unix_newlines(text: str) -> str:
    return io.StringIO(text, newline=None).read() if "\r" in text else text
