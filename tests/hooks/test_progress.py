"""What a person sees: plain lines in a file or a log, a bar in a terminal."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from panda.files import activity
from panda.hooks.progress import ProgressDisplay
from panda.registry import NoOptions
from panda.registry.contexts import PluginContext
from panda.run.interruption import Interrupted


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """``clock[0]`` is the time."""
    now = [1.0]  # the clock of a machine that has just been started
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def started(run: Any) -> ProgressDisplay:
    plugin = ProgressDisplay(NoOptions(), PluginContext())
    plugin.panda_run_start(run)
    return plugin


def test_where_there_is_no_terminal_a_line_says_that_training_begins(
    make_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    started(make_run())
    assert capsys.readouterr().out == "training ...\n"


def test_where_there_is_no_terminal_a_record_is_a_plain_line(
    make_run: Any, record: Any, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    run = make_run()
    plugin = started(run)
    capsys.readouterr()
    plugin.panda_log(run, record(1, loss=5.43219))
    line = capsys.readouterr().out
    parts = r"\d\d:\d\d:\d\d  step 1/10  loss 5.4322  12,346 tokens/s  lr 5.00e-05  grad norm 1.250\n"
    assert re.fullmatch(parts, line)
    assert "\x1b" not in line
    assert "\r" not in line


def test_the_router_loss_follows_the_loss(
    make_run: Any, record: Any, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    run = make_run()
    plugin = started(run)
    plugin.panda_log(run, record(1, loss=5.43219, router_loss=2.00049))
    assert "step 1/10  loss 5.4322  router loss 2.0005  12,346 tokens/s" in capsys.readouterr().out


def test_plain_lines_are_seconds_apart_but_for_the_first_and_the_last(
    make_run: Any, record: Any, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    run = make_run()
    plugin = started(run)
    capsys.readouterr()
    for step in range(1, 11):
        plugin.panda_step_end(run, step)
        plugin.panda_log(run, record(step))
        clock[0] += 0.9
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["1/10", "4/10", "7/10", "10/10"]
    assert lines[1].endswith("  0:03, ETA 0:04") and lines[-1].endswith("  0:08, ETA 0:00")


def test_the_end_says_what_was_reached_where_everything_is_and_what_the_model_answers(
    make_run: Any, record: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    run.answers = [{"prompt": "Spell panda.", "answer": "p-a-n-d-a\n\x1b[2J"}]
    (run.directory / "loss.png").touch()
    (run.directory / "export").mkdir()
    plugin = started(run)
    for step in (1, 2, 10):
        plugin.panda_log(run, record(step, loss=10.0 / step))
    capsys.readouterr()
    plugin.panda_run_end(run)
    out = capsys.readouterr().out
    assert "loss 10.0000 at step 1, 1.0000 at step 10\n" in out
    assert f"\n{run.directory}/\n" in out
    assert "  loss.png " in out
    assert "  export " in out
    assert "tensorboard" not in out
    assert "\n> Spell panda.\np-a-n-d-a\n\\x1b[2J\n" in out
    assert f"panda generate {run.directory} --prompt" in out and f"panda-train --resume {run.directory} " in out
    assert re.search(r"^0:0\d for 10 steps, 1,000 tokens$", out, re.M)


def test_a_run_without_a_record_ends_all_the_same(make_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    started(run).panda_run_end(run)
    assert f"{run.directory}/" in capsys.readouterr().out


def test_only_rank_0_speaks(make_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(rank=1)
    plugin = started(run)
    plugin.panda_run_end(run)
    plugin.panda_exception(run, ValueError())
    assert capsys.readouterr().out == ""


def terminal_in_place_of_stdout(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A wide one. Called by the test itself, since pytest sets stdout between a fixture and a test."""

    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    for key, value in {"COLUMNS": "200", "LINES": "24", "TERM": "xterm"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(activity, "SHOWN_AFTER", 0.0)
    monkeypatch.setattr(sys, "stdout", found := Terminal())
    return found


@pytest.mark.parametrize("end", ["panda_run_end", "panda_exception"])
def test_a_terminal_has_a_line_that_is_taken_down_however_a_run_ends(
    make_run: Any, record: Any, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    terminal = terminal_in_place_of_stdout(monkeypatch)
    run = make_run(step=2)
    plugin = started(run)
    plugin.panda_step_end(run, 7)
    plugin.panda_log(run, record(7, loss=2.0))
    assert activity._live is not None
    activity._live.refresh()
    bar = "━" * 14 + "─" * 6
    assert f"training  {bar}  7/10  ETA 0:00  loss 2.0000  epoch 0.09/0.1297  12,346 tokens/s" in terminal.getvalue()
    assert "grad norm 1.250" in terminal.getvalue()
    assert "step 7/10" not in terminal.getvalue(), "no line that stays, so soon"
    plugin.panda_run_end(run) if end == "panda_run_end" else plugin.panda_exception(run, ValueError())
    assert activity._live is None
    assert "\x1b[?25h" in terminal.getvalue(), "the cursor is shown again"


def test_a_terminal_keeps_a_line_a_minute(
    make_run: Any, record: Any, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    terminal = terminal_in_place_of_stdout(monkeypatch)
    run = make_run()
    plugin = started(run)
    for step in range(1, 11):
        plugin.panda_step_end(run, step)
        plugin.panda_log(run, record(step))
        clock[0] += 25
    plugin.panda_run_end(run)
    assert re.findall(r"step (\d+)/10", terminal.getvalue()) == ["4", "7", "10"]


def test_a_line_that_is_kept_fits_the_terminal(
    make_run: Any, record: Any, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    terminal = terminal_in_place_of_stdout(monkeypatch)
    monkeypatch.setenv("COLUMNS", "80")
    said: list[str] = []
    monkeypatch.setattr("panda.hooks.progress.say", said.append)
    plugin = started(make_run())
    for step in (1, 2):
        clock[0] += 60
        plugin.panda_step_end(make_run(), step)
        plugin.panda_log(make_run(), record(step, mfu=0.345, memory_gib=70.5))
    plugin.panda_run_end(make_run())
    assert terminal.getvalue() and len(said) == 2
    for line in said:
        assert len(line) < 80 and re.search(r"  loss \d\.\d{4}  \d:00, ETA \d:\d\d  12,346 tokens/s  MFU 34.5%", line)


def test_the_loss_that_moves_is_smoothed_and_not_spoilt_by_one_that_is_not_finite(make_run: Any) -> None:
    plugin = started(make_run())
    shown = [plugin._smoothed(loss) for loss in (4.0, 2.0, math.nan, 2.0)]
    assert shown[:2] == pytest.approx([4.0, (0.9 * 4 + 2) / 1.9])
    assert math.isnan(shown[2]) and shown[3] == pytest.approx((0.81 * 4 + 0.9 * 2 + 2) / 2.71)
    plugin.shown.close()


def test_a_run_that_is_stopped_says_how_to_go_on(
    make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(step=7)
    started(run).panda_exception(run, ValueError())
    assert f"the run stopped after step 7, in {run.directory}\nto begin it again: " in (said := capsys.readouterr().out)
    assert said.endswith(f"panda-train --resume auto --output_dir {run.directory}\n")
    run.checkpoints = [tmp_path / "step-00000005", tmp_path / "gone"]
    run.checkpoints[0].mkdir()
    started(run).panda_exception(run, ValueError())
    assert capsys.readouterr().out == said, "it is of another run, which must not be continued in its place"
    run.resolved.core.user_dir, run.resolved.lasting = (
        "/my lab",
        {"plugins": ("no:plot", "/mine.py:shout"), "optimizer": "lion"},
    )
    started(run).panda_exception(run, ValueError())
    again = f"--output_dir {run.directory} --user_dir '/my lab' --plugins no:plot /mine.py:shout\n"
    assert again in capsys.readouterr().out
    run.checkpoints = [run.directory / "checkpoints/step-00000005"]
    run.checkpoints[0].mkdir(parents=True)
    started(run).panda_exception(run, ValueError())
    assert f"panda-train --resume {run.directory} --user_dir" in capsys.readouterr().out
    started(run).panda_exception(run, Interrupted())
    assert capsys.readouterr().out == "training ...\n", "it says it itself"


def test_evaluations_are_shown_and_the_last_is_in_the_summary(
    make_run: Any, record: Any, evaluation: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    plugin = started(run)
    capsys.readouterr()
    for step, loss in ((5, 1.25), (10, 1.5)):
        plugin.panda_evaluation(run, evaluation(step, loss))
        line = capsys.readouterr().out
        assert re.fullmatch(rf"\d\d:\d\d:\d\d  step {step}/10  evaluation loss {loss:.4f}  0.2 s\n", line)
    plugin.panda_log(run, record(10))
    plugin.panda_run_end(run)
    assert "\nevaluation loss 1.5000 at step 10, the least 1.2500 at step 5\n" in capsys.readouterr().out


def test_the_best_of_earlier_starts_is_in_the_summary(
    make_run: Any, record: Any, evaluation: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(step=6)
    written = [evaluation(3, 1.25), evaluation(6, 1.75), evaluation(9, 0.5)]  # the last after the checkpoint
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in written))
    plugin = started(run)
    plugin.panda_evaluation(run, evaluation(10, 1.5))
    plugin.panda_log(run, record(10))
    plugin.panda_run_end(run)
    assert "\nevaluation loss 1.5000 at step 10, the least 1.2500 at step 3\n" in capsys.readouterr().out


def test_an_evaluation_stands_above_the_line_that_moves(
    make_run: Any, evaluation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = terminal_in_place_of_stdout(monkeypatch)
    run = make_run()
    plugin = started(run)
    plugin.panda_evaluation(run, evaluation(5))
    plugin.panda_run_end(run)
    assert "step 5/10  evaluation loss 1.5000" in terminal.getvalue()
