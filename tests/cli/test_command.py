"""What all commands share: streams whose encoding lacks a character."""

from __future__ import annotations

import io
import sys

import pytest

from panda.cli.command import run_command
from panda.files.terminal import printable
from panda.registry import UserError


@pytest.mark.parametrize(
    ("errors", "written"),
    [("strict", b"\\u7af9 \\xe9 \\udcff\n"), ("surrogateescape", b"\\u7af9 \\xe9 \\udcff\n"), ("replace", b"? ? ?\n")],
)
def test_characters_that_an_encoding_lacks_are_replaced(
    monkeypatch: pytest.MonkeyPatch, errors: str, written: bytes
) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def command(argv: list[str]) -> None:
        print("竹 é \udcff")
        raise UserError("竹")

    assert run_command(command, []) == 2
    out.flush()
    err.flush()
    assert out.buffer.getvalue() == written
    assert err.buffer.getvalue() in (b"error: \\u7af9\n", b"error: ?\n")


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert printable("a\tb\n竹 é") == "a\tb\n竹 é"
    assert printable("\x1b[2J\x00\r\x7f\x9b") == "\\x1b[2J\\x00\\r\\x7f\\x9b"
    assert printable("x\u202ey\u2066\u200f") == "x\\u202ey\\u2066\\u200f"
