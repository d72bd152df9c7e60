"""What is typed in a chat: edited by readline, and kept for the next one."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from panda.cli import typed_lines
from panda.cli.typed_lines import TypedLines
from panda.registry import UserError

readline = pytest.importorskip("readline")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where it is kept."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    readline.clear_history()
    yield tmp_path / "panda" / "chat_history.jsonl"
    readline.clear_history()


def typed(
    monkeypatch: pytest.MonkeyPatch, text: str, *, keeps: bool = True, answers: io.StringIO | None = None
) -> list[str]:
    """The messages of a chat in which ``text`` is typed. The answers go to a terminal, or to ``answers``."""
    monkeypatch.setattr("sys.stdout", answers or Terminal())
    monkeypatch.setattr("sys.stdin", Terminal(text))
    lines, found = TypedLines(["/reset", "/save"], keeps=keeps), []
    with pytest.raises(EOFError):
        while True:
            found.append(lines.read('"""'))
    return found


def remembered() -> list[str]:
    return [readline.get_history_item(1 + number) for number in range(readline.get_current_history_length())]


def test_what_was_typed_is_there_in_the_next_chat_and_only_its_owner_reads_it(
    history: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert typed(monkeypatch, 'one\n\n"""two\nlines"""\n竹\n') == ["one", "", " two\nlines", "竹"]
    assert history.stat().st_mode & 0o777 == 0o600 and history.parent.stat().st_mode & 0o077 == 0
    readline.clear_history()
    typed(monkeypatch, "later\n")
    assert remembered() == ["one", " two\nlines", "竹", "later"]


def test_a_user_without_a_home_folder_keeps_none(
    history: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nobodys_home: None
) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.chdir(tmp_path)
    assert typed(monkeypatch, "one\n") == ["one"] == remembered()
    assert not [*tmp_path.iterdir()]


def test_a_history_is_not_kept_where_nobody_types_or_wants_it(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "secret\n", keeps=False)
    assert remembered() == ["secret"] and not history.exists()
    readline.clear_history()
    typed(monkeypatch, "secret\n", answers=io.StringIO())
    assert remembered() == [] and not history.exists()


def test_a_closed_input_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="stdin is closed"):
        TypedLines((), keeps=True)


def test_a_history_stays_small_and_passes_over_what_it_cannot_read(
    history: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(typed_lines, "KEPT", 3)
    history.parent.mkdir(parents=True)
    history.write_text("".join(json.dumps(f"line {number}") + "\n" for number in range(7)) + "not JSON\n")
    typed(monkeypatch, "")
    assert remembered() == ["line 5", "line 6"]
    assert len(history.read_text().splitlines()) == 3 and history.stat().st_mode & 0o777 == 0o600


def test_a_history_that_cannot_be_kept_is_said_once(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    history.parent.write_text("no folder")
    assert typed(monkeypatch, "a\nb\n") == ["a", "b"]
    assert capsys.readouterr().err.splitlines() == [f"{history}: Not a directory: what you type is not kept."]


def test_commands_are_completed(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "")
    complete = readline.get_completer()
    assert [complete("/s", 0), complete("/s", 1), complete("s", 0)] == ["/save", None, None]


def test_a_prompt_is_not_written_into_the_answers(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = io.StringIO()
    typed(monkeypatch, "a\n", answers=answers)
    assert answers.getvalue() == "" and capsys.readouterr().err == "> > "
