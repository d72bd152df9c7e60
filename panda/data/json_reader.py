"""The ``json`` reader: arrays, single objects, JSON Lines, and what people call those."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from panda.data.reading import BadRow
from panda.data.reading import Row
from panda.registry import NoOptions
from panda.registry import UserError
from panda.registry import register_reader
from panda.registry.contexts import ReaderContext

# strict=False allows raw newlines and tabs inside strings: PandaLLM's own example of the
# pretraining format has them.
_DECODER = json.JSONDecoder(strict=False)
_SPACE = " \t\r\n"


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
            raise UserError(
                f"{file}: not UTF-8: byte {problem.object[problem.start]:#04x} at offset {problem.start}."
                " Convert the file to UTF-8."
            ) from None
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
                yield BadRow(file, number, f"expected an object, {{...}}, found {_kind(element)}")


class _Unreadable:
    def __init__(self, problem: str) -> None:
        self.problem = problem


def _array(file: Path, text: str, position: int) -> Iterator[Any]:
    position = _skip_space(text, position)
    number = 1
    while text[position : position + 1] != "]":
        try:
            element, position = _DECODER.raw_decode(text, position)
            position = _skip_space(text, position)
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']' after a row", text, position)
        except json.JSONDecodeError as problem:
            raise UserError(
                f"{file}:{problem.lineno}:{problem.colno}: not valid JSON, in row {number}: {problem.msg}."
                f"{' The file ends there: is it cut short?' if not text[problem.pos :].strip() else ''}"
            ) from None
        yield element
        number += 1
        if text[position] == ",":
            position = _skip_space(text, position + 1)
    rest = _skip_space(text, position + 1)
    if rest != len(text):
        raise UserError(f"{file}: there is text after the array's closing ']': {text[rest : rest + 40]!r}.")


def _sequence(file: Path, text: str, position: int) -> Iterator[Any]:
    """Objects one after another. After a syntax error, reading goes on at the next line that opens one."""
    while position < len(text):
        try:
            element, position = _DECODER.raw_decode(text, position)
            yield element
        except json.JSONDecodeError as problem:
            yield _Unreadable(f"not valid JSON at line {problem.lineno}, column {problem.colno}: {problem.msg}")
            following = text.find("\n{", position + 1)
            position = len(text) if following < 0 else following
        position = _skip_space(text, position)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position


def _kind(element: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(element), "null")
