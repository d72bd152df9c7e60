"""The ``json`` reader: arrays, single objects, JSON Lines, and what people call those."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from panda.data.reading import BadRow
from panda.data.reading import Row
from panda.data.reading import kind_of
from panda.registry import NoOptions
from panda.registry import UserError
from panda.registry import register_reader
from panda.registry.contexts import ReaderContext

# strict=False allows raw newlines and tabs inside strings: PandaLLM's own example of the
# pretraining format has them.
_DECODER = json.JSONDecoder(strict=False)
_SPACE = " \t\r\n"
_LINE_END = re.compile(r"[ \t\r]*(\n|\Z)")
_NEXT_LINE = re.compile(r"\n")
_NEXT_OBJECT = re.compile(r"\n[ \t]*(?=\{)")


@register_reader("json")
class JsonReader:
    """JSON: an array of objects, one object, or objects one after another (JSON Lines)."""

    suffixes = (".json", ".jsonl")

    def __init__(self, options: NoOptions, context: ReaderContext) -> None:
        pass

    def read(self, file: Path) -> Iterator[Row | BadRow]:
        """Rows in order. A syntax error inside an array ends the file and is an error; between the
        objects of a JSON Lines file it costs one row, which is reported."""
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as problem:
            line = problem.object.count(b"\n", 0, problem.start) + 1
            byte = problem.object[problem.start]
            raise UserError(f"{file}:{line}: not UTF-8: byte {byte:#04x}. Convert the file to UTF-8.") from None
        except OSError as problem:
            raise UserError(f"{file}: cannot be read: {problem.strerror}") from None
        start = _skip_space(text, 0)
        if start == len(text):
            raise UserError(f"{file}: the file is empty. Expected a JSON array of objects, an object, or JSON Lines.")
        elements = _array(file, text, start + 1) if text[start] == "[" else _sequence(file, text, start)
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


def _array(file: Path, text: str, position: int) -> Iterator[Any]:
    position = _skip_space(text, position)
    number = 1
    while text[position : position + 1] != "]":
        try:
            element, position = _decode(text, position)
            position = _skip_space(text, position)
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']' after a row", text, position)
        except json.JSONDecodeError as problem:
            ended = problem.msg.startswith("Unterminated string") or not text[problem.pos :].strip()
            raise UserError(
                f"{file}:{problem.lineno}:{problem.colno}: not valid JSON, in row {number}: {problem.msg}."
                f"{' The file ends there: is it cut short?' if ended else ''}"
            ) from None
        yield element
        number += 1
        if text[position] == ",":
            position = _skip_space(text, position + 1)
    rest = _skip_space(text, position + 1)
    if rest != len(text):
        raise UserError(f"{file}: there is text after the array's closing ']': {text[rest : rest + 40]!r}.")


def _sequence(file: Path, text: str, position: int) -> Iterator[Any]:
    """Objects one after another. After a syntax error in one, reading goes on at the next line that opens one."""
    while position < len(text):
        try:
            element, end = _decode(text, position)
            if not isinstance(element, dict) and not _LINE_END.match(text, end):
                raise json.JSONDecodeError("Expecting an object", text, position)
            yield element
        except json.JSONDecodeError as problem:
            yield _Unreadable(f"not valid JSON at line {problem.lineno}, column {problem.colno}: {problem.msg}")
            # An object may be spread over lines. What does not begin as one is taken line by line.
            following = (_NEXT_OBJECT if text[position] == "{" else _NEXT_LINE).search(text, position)
            end = following.end() if following else len(text)
        position = _skip_space(text, end)


def _decode(text: str, position: int) -> tuple[Any, int]:
    """The JSON value at ``position``, and where it ends. Raises JSONDecodeError whatever is wrong with it."""
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as problem:  # nested too deeply; a number of more digits than Python reads
        raise json.JSONDecodeError(str(problem), text, position) from None


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position
