"""What a process is doing, as somebody who watches sees it."""

from __future__ import annotations

import io
import re
import sys
import threading
import time

import pytest

from panda.files import activity as module
from panda.files.activity import Activity
from panda.files.activity import activity
from panda.files.activity import duration
from panda.files.activity import say
from panda.files.activity import stand
from panda.files.activity import standing


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def terminal_in_place_of_stdout(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """One of 80 columns. Called by the test itself, since pytest sets stdout between a fixture and a test."""
    stream = Terminal()
    for key, value in {"COLUMNS": "80", "LINES": "24", "TERM": "xterm"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(module, "SHOWN_AFTER", 0.0)
    return stream


def shown(stream: Terminal) -> str:
    """What was written, without what moves the cursor and colours."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_a_terminal_shows_what_is_under_way_and_nothing_of_it_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = terminal_in_place_of_stdout(monkeypatch)
    with activity("evaluating", 400, unit="batches") as outer, activity("reading", 2e9, unit="B") as inner:
        outer.advance(100)
        inner.advance(5e8)
        assert module._live is not None
        module._live.refresh()
        say("a note")
    lines = shown(terminal).replace("\r", "\n").splitlines()
    assert any(line.startswith("evaluating  ━━━━━───────────────  100/400 batches  ETA 0:0") for line in lines)
    assert any(line.startswith("reading  ━━━━━───────────────  0.5/2.0 GB  ETA 0:0") for line in lines)
    assert "a note" in lines
    assert module._live is None and "\x1b[?25h" in terminal.getvalue(), "the cursor is shown again"


def test_a_line_fits_its_width_and_what_comes_last_is_left_out_first() -> None:
    found = Activity("training", 675, 120, facts=["loss 2.1345", "epoch 0.5/3", "12,345 tokens/s", "MFU 58.0%"])
    found.begun -= 60
    bar = "━" * 4 + "─" * 16
    facts = "loss 2.1345  epoch 0.5/3  12,345 tokens/s  MFU 58.0%"
    assert found.text(200, bar=True) == f"training  {bar}  120/675  ETA 4:38  {facts}"
    assert found.text(80, bar=True).endswith("ETA 4:38  loss 2.1345  epoch 0.5/3")
    for width in range(1, 120):
        assert len(found.text(width, bar=True)) <= width
    assert found.text(24, bar=False) == "training  120/675"


def test_the_time_left_follows_from_this_start_alone() -> None:
    found = Activity("training", 100, 60, done_before=50)
    found.begun -= 10
    assert found.left == pytest.approx(40, rel=0.05)
    assert Activity("training", 100, 50, done_before=50).left is None


def test_where_there_is_no_terminal_what_takes_long_is_a_line_with_the_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(module, "TICK_SECONDS", 0.02)
    with activity("evaluating", 8, announced=True) as found:
        found.advance(2)
        time.sleep(0.2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "evaluating ..."
    assert any(re.fullmatch(r"\d\d:\d\d:\d\d  evaluating  2/8  ETA 0:0\d", line) for line in lines)
    assert module._ticking is None


def test_what_is_short_is_no_line_unless_it_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    with activity("saving"):
        pass
    assert capsys.readouterr().out == ""


def test_only_the_first_rank_speaks_except_for_what_only_one_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with activity("evaluating", announced=True):
        say("a note")
    assert capsys.readouterr().out == ""
    with activity("tokenising", announced=True, any_rank=True):
        assert standing()[0] == "tokenising"
    assert capsys.readouterr().out == "tokenising ...\n"


def test_a_thread_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with activity("reading", announced=True):
            pass

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert capsys.readouterr().out == ""


def test_what_a_process_does_is_that_of_the_innermost_and_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    stand("step 3")
    _, before = standing()
    with pytest.raises(KeyError), activity("saving"):
        assert standing()[0] == "saving"
        raise KeyError
    assert standing()[0] == "step 3" and standing()[1] > before
    assert module._ticking is None and not module._under_way


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (725, "12:05"), (11045, "3:04:05")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
