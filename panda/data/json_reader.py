"""The ``json`` reader: arrays, single objects, JSON Lines, and variants of those.

A file is decoded through a window that slides over it, so memory holds a megabyte, or the largest row up to
``max_row_bytes``, and never the whole file.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from typing import BinaryIO

from panda.data.packed_files import not_utf8
from panda.data.packed_files import open_binary
from panda.data.packed_files import with_packed
from panda.data.reading import WINDOW
from panda.data.reading import BadRow
from panda.data.reading import Row
from panda.data.reading import kind_of
from panda.data.reading import too_large
from panda.registry import NoOptions
from panda.registry import UserError
from panda.registry import register_reader
from panda.registry.contexts import ReaderContext

_SPACE = re.compile(r"[ \t\r\n]*")
_NEXT_LINE = re.compile(r"\n")
_NEXT_OBJECT = re.compile(r"\n[ \t]*(?=\{)")
_NEXT_OBJECT_AT_THE_MARGIN = re.compile(r"\n(?=\{)")
_IN_STRING = re.compile(r'"|\\')
_BETWEEN_STRINGS = re.compile(r'["\[\]{}]')
_END_OF_WORD = re.compile(r"[\s,\[\]{}]")
_NUMBER_GOES_ON = re.compile(r"[0-9.eE+-]*\Z")
_LONGEST_WORD = len("-Infinity")
"""An error this close to the end of what was read may be a word or an escape that continues after it."""


@register_reader("json")
class JsonReader:
    """JSON: an array of objects, one object, or objects one after another (JSON Lines); also packed."""

    suffixes = with_packed(".json", ".jsonl", ".ndjson")

    def __init__(self, options: NoOptions, context: ReaderContext) -> None:
        self.limit = context.max_row_bytes

    def read(self, file: Path) -> Iterator[Row | BadRow]:
        """Rows in order. A syntax error inside an array ends the file and is an error; between the
        objects of a JSON Lines file it costs one row, which is reported. So do, in either, a row that is nested
        too deeply, has a number of too many digits, or a field twice with different values."""
        with open_binary(file) as stream:
            window = _Window(file, stream, self.limit)
            window.skip_space()
            if window.at_end():
                raise UserError(
                    f"{file}: the file is empty. Expected a JSON array of objects, an object, or JSON Lines."
                )
            elements = _array(window) if window.character() == "[" else _sequence(window)
            for number, element in enumerate(elements, 1):
                if isinstance(element, _Unreadable):
                    yield BadRow(file, number, element.problem)
                elif isinstance(element, dict):
                    yield Row(element, file, number)
                else:
                    yield BadRow(file, number, f"expected an object, {{...}}, found {kind_of(element)}")


class _Unreadable:
    def __init__(self, problem: str) -> None:
        self.problem = problem


class _UnreadableError(Exception):
    """The value at the position of a window, where that stays, cannot be read, but its end can be found."""


class _Window:
    """The text of a file from a position on. Text before the position is forgotten."""

    def __init__(self, file: Path, stream: BinaryIO, limit: int) -> None:
        """``limit``: the most bytes of a value that is decoded."""
        self.file, self.stream, self.limit = file, stream, limit
        self.text = ""
        self.position = 0
        self.complete = False
        """Whether ``text`` reaches to the end of the file."""
        # strict=False allows raw newlines and tabs inside strings: PandaLLM's own example of the pretraining format has
        # them.
        self._decoder = json.JSONDecoder(strict=False, object_pairs_hook=self._object)
        self._repeated: str | None = None
        """A field that an object of the value that is being decoded has twice, with different values."""
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._lines = 0
        """Newlines before ``text``."""
        self._columns = 0
        """Characters of the line in which ``text`` begins, before it."""
        self._newlines_read = 0

    def more(self) -> bool:
        """Read as many bytes again: a row that does not fit is decoded again each time. False at the file's end."""
        if self.complete:
            return False
        raw = self.stream.read(max(WINDOW, min(len(self.text) - self.position, self.limit)))
        self.complete = not raw
        try:
            text = self._utf8.decode(raw, final=self.complete)
        except UnicodeDecodeError as problem:
            line = self._newlines_read + problem.object.count(b"\n", 0, problem.start) + 1
            raise not_utf8(self.file, line, problem.object[problem.start]) from None
        self._newlines_read += raw.count(b"\n")
        if self.complete:
            return False
        forgotten = self.text[: self.position]
        newlines = forgotten.count("\n")
        self._lines += newlines
        self._columns = len(forgotten) - forgotten.rfind("\n") - 1 + (0 if newlines else self._columns)
        self.text, self.position = self.text[self.position :] + text, 0
        return True

    def character(self) -> str:
        """The character at the position; empty at the end of the file."""
        return self.ahead(1)

    def ahead(self, count: int) -> str:
        """The next ``count`` characters, or as many as there are."""
        while len(self.text) - self.position < count and self.more():
            pass
        return self.text[self.position : self.position + count]

    def at_end(self) -> bool:
        return not self.character()

    def skip_space(self) -> None:
        while True:
            found = _SPACE.match(self.text, self.position)
            assert found is not None
            self.position = found.end()
            if self.position < len(self.text) or not self.more():
                return

    def decode(self) -> Any:
        """The JSON value at the position, which moves to its end; ``_Unreadable`` if it has a field twice.

        Raises JSONDecodeError for what is no JSON, and _UnreadableError for a value of more than ``limit`` bytes, and
        for what Python cannot decode.
        """
        while True:
            self._repeated = None
            try:
                value, end = self._decoder.raw_decode(self.text, self.position)
                # A number may continue after the end of the window; a value in brackets or quotes has its end.
                goes_on = isinstance(value, (int, float)) and _NUMBER_GOES_ON.match(self.text, end)
                if not (goes_on and self._more_within_limit()):
                    self._refuse_too_large(end)
                    self.position = end
                    repeated = self._repeated
                    return value if repeated is None else _Unreadable(f"it has {repeated!r} twice, with two values")
            except json.JSONDecodeError as problem:
                cut_off = problem.msg.startswith("Unterminated string") or (
                    problem.pos > len(self.text) - _LONGEST_WORD
                )
                if not (cut_off and self._more_within_limit()):
                    if problem.pos - self.position > self.limit:
                        raise self._too_large() from None
                    raise
            except RecursionError:
                raise _UnreadableError("it is nested too deeply to be read") from None
            except ValueError:
                digits = sys.get_int_max_str_digits()
                raise _UnreadableError(f"it has a whole number of more than {digits:,} digits") from None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            self._repeated = next((name for name, value in pairs if made[name] != value), self._repeated)
        return made

    def _too_large(self) -> _UnreadableError:
        return _UnreadableError(too_large(self.limit))

    def _more_within_limit(self) -> bool:
        """``more``, of a value that begins at the position and is not complete yet."""
        if len(self.text) - self.position > self.limit:  # a character has at least a byte
            raise self._too_large()
        return self.more()

    def _refuse_too_large(self, end: int) -> None:
        most_bytes_a_character = 4
        if (end - self.position) * most_bytes_a_character <= self.limit:
            return
        if len(self.text[self.position : end].encode(errors="surrogatepass")) > self.limit:
            raise self._too_large()

    def next_match(self, pattern: re.Pattern[str], begin: str = "\n") -> bool:
        """Move to the end of the next match of ``pattern``, which begins with ``begin``, or to the end of the file.

        Whether there is one.
        """
        while not (found := pattern.search(self.text, self.position)):
            # A match may begin in what was read, and end after it.
            last = self.text.rfind(begin, self.position) if begin else -1
            self.position = last if last >= 0 and len(self.text) - last <= self.limit else len(self.text)
            if not self.more():
                self.position = len(self.text)
                return False
        self.position = found.end()
        return True

    def skip_value(self) -> bool:
        """Move to the end of the JSON value at the position without holding it. Whether it has an end."""
        if self.character() not in ("{", "[", '"'):
            found = self.next_match(_END_OF_WORD, "")
            self.position -= found
            return found
        depth, in_string = 0, False
        while self.next_match(_IN_STRING if in_string else _BETWEEN_STRINGS, ""):
            character = self.text[self.position - 1]
            if character == "\\":
                if not self.character():
                    return False
                self.position += 1
            elif character == '"':
                in_string = not in_string
            else:
                depth += 1 if character in "[{" else -1
            if depth == 0 and not in_string:
                return True
        return False

    def place(self, problem: json.JSONDecodeError) -> tuple[int, int]:
        """Line and column in the file of an error in ``text``, both counted from 1."""
        column = problem.colno + (self._columns if problem.lineno == 1 else 0)
        return self._lines + problem.lineno, column


def _array(window: _Window) -> Iterator[Any]:
    window.position += 1
    window.skip_space()
    number = 1
    while window.character() != "]":
        try:
            element = _array_element(window)
            window.skip_space()
            if window.character() not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']' after a row", window.text, window.position)
        except json.JSONDecodeError as problem:
            line, column = window.place(problem)
            ended = problem.msg.startswith("Unterminated string") or not window.text[problem.pos :].strip()
            raise UserError(
                f"{window.file}:{line}:{column}: not valid JSON, in row {number}: {problem.msg}."
                f"{' The file ends there: is it cut short?' if ended else ''}"
            ) from None
        yield element
        number += 1
        if window.character() == ",":
            window.position += 1
            window.skip_space()
    window.position += 1
    window.skip_space()
    if not window.at_end():
        raise UserError(f"{window.file}: there is text after the array's closing ']': {window.ahead(40)!r}.")


def _array_element(window: _Window) -> Any:
    try:
        return window.decode()
    except _UnreadableError as problem:
        if not window.skip_value():
            raise json.JSONDecodeError("Unterminated string or row", window.text, window.position) from None
        return _Unreadable(str(problem))


def _sequence(window: _Window) -> Iterator[Any]:
    """Objects one after another. After a syntax error in one, reading continues at the next line that opens one."""
    while not window.at_end():
        opens_object = window.character() == "{"
        try:
            element = window.decode()
            if not isinstance(element, (dict, _Unreadable)) and not _line_ends(window):
                raise json.JSONDecodeError("Expecting an object", window.text, window.position)
            yield element
        except _UnreadableError as problem:
            yield _Unreadable(str(problem))
            # Not where brackets and quotes end it: one that lacks its end would take the rest of the file with it.
            window.next_match(_NEXT_OBJECT_AT_THE_MARGIN if opens_object else _NEXT_LINE)
        except json.JSONDecodeError as problem:
            line, column = window.place(problem)
            yield _Unreadable(f"not valid JSON at line {line}, column {column}: {problem.msg}")
            # An object may span several lines. Text that does not begin as one is taken line by line.
            window.next_match(_NEXT_OBJECT if opens_object else _NEXT_LINE)
        window.skip_space()


def _line_ends(window: _Window) -> bool:
    """Whether the rest of the line is only space."""
    count = 1
    while (rest := window.ahead(count)).isspace() and "\n" not in rest and len(rest) == count:
        count += 1
    return not rest.strip(" \t\r\n") or "\n" in rest
