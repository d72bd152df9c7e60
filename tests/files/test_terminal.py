"""Text from data does not steer the terminal that it is printed on."""

from __future__ import annotations

import unicodedata
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from panda.files.terminal import fitted
from panda.files.terminal import printable
from panda.files.terminal import printable_line

TEXT = st.text(st.characters(exclude_categories=()))


@given(TEXT)
def test_nothing_steers_and_all_else_is_as_it_was(text: str) -> None:
    shown = printable(text)
    for character in shown:
        assert character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")
        assert unicodedata.bidirectional(character) not in (
            "LRE",
            "RLE",
            "LRO",
            "RLO",
            "PDF",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
        )
    shown.encode()
    assert printable(shown) == shown
    if all(character.isprintable() or character in "\n\t" for character in text):
        assert shown == text
    assert printable_line(text).isprintable() or not text.isprintable()
    assert len(f"a{printable_line(text)}b".splitlines()) == 1


@given(TEXT, TEXT)
def test_a_text_can_be_printed_in_pieces(before: str, after: str) -> None:
    assert printable(before) + printable(after) == printable(before + after)


def test_escapes_are_those_of_python() -> None:
    assert printable("\x1b[31mred\r\n\t\x7f\x9b\u202e\ud800é👩‍🚀") == (
        "\\x1b[31mred\\r\n\t\\x7f\\x9b\\u202e\\ud800é👩‍🚀"
    )
    assert printable_line("a\n\tb") == "a\\n\\tb"


def test_lines_are_wrapped_at_words_where_a_terminal_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["data        chats: 4,320 samples of 5,400 rows", "seed        42"]
    assert list(fitted(lines, 12)) == lines, "no terminal"
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setenv("COLUMNS", "36")
    assert list(fitted(lines, 12)) == [
        "data        chats: 4,320 samples of",
        "            5,400 rows",
        "seed        42",
    ]
    monkeypatch.setenv("COLUMNS", "5")
    assert all(len(line.split()) > 0 for line in fitted(["a       " + "x" * 90], 12)), "words stay whole"
