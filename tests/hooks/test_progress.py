"""What a person sees: plain lines in a file or a log, a bar in a terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from panda.hooks.progress import ProgressDisplay
from panda.registry import NoOptions
from panda.registry.contexts import PluginContext
from panda.run.interruption import Interrupted


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """``clock[0]`` is the time."""
    now = [1.0]  # the clock of a machine that has just been started
    monkeypatch.setattr("panda.hooks.progress.time.monotonic", lambda: now[0])
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
    assert line == "step 1/10  loss 5.4322  lr 5.00e-05  grad norm 1.250  12,346 tokens/s\n"
    assert "\x1b" not in line
    assert "\r" not in line


def test_the_router_loss_follows_the_loss(
    make_run: Any, record: Any, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    run = make_run()
    plugin = started(run)
    plugin.panda_log(run, record(1, loss=5.43219, router_loss=2.00049))
    assert "step 1/10  loss 5.4322  router loss 2.0005  lr 5.00e-05" in capsys.readouterr().out


def test_plain_lines_are_seconds_apart_but_for_the_first_and_the_last(
    make_run: Any, record: Any, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    run = make_run()
    plugin = started(run)
    capsys.readouterr()
    for step in range(1, 11):
        plugin.panda_log(run, record(step))
        clock[0] += 0.9
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["1/10", "4/10", "7/10", "10/10"]


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
    assert out.endswith("\n> Spell panda.\np-a-n-d-a\n\\x1b[2J\n")


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


class _Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("end", ["panda_run_end", "panda_exception"])
def test_a_terminal_has_a_bar_that_is_taken_down_however_a_run_ends(
    make_run: Any, record: Any, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    terminal = _Terminal()
    for key, value in {"COLUMNS": "200", "TERM": "xterm"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", terminal)
    run = make_run(step=2)
    plugin = started(run)
    assert plugin.bar is not None
    plugin.panda_log(run, record(7))
    plugin.bar.refresh()
    assert "7/10" in terminal.getvalue()
    assert "grad norm 1.250" in terminal.getvalue()
    assert "step 7/10" not in terminal.getvalue()
    plugin.panda_run_end(run) if end == "panda_run_end" else plugin.panda_exception(run, ValueError())
    assert plugin.bar is None
    assert "\x1b[?25h" in terminal.getvalue(), "the cursor is shown again"


def test_a_run_that_is_stopped_says_how_to_go_on(
    make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(step=7)
    core = SimpleNamespace(user_dir=None)
    run.resolved = SimpleNamespace(core=core, lasting={})
    started(run).panda_exception(run, ValueError())
    assert f"the run stopped after step 7, in {run.directory}\nno checkpoint was saved" in capsys.readouterr().out
    run.checkpoints = [tmp_path / "step-00000005", tmp_path / "gone"]
    run.checkpoints[0].mkdir()
    started(run).panda_exception(run, ValueError())
    assert f"/config.yaml --resume {tmp_path / 'step-00000005'}\n" in capsys.readouterr().out
    core.user_dir, run.resolved.lasting = "/my lab", {"plugins": ("no:plot", "/mine.py:shout"), "optimizer": "lion"}
    started(run).panda_exception(run, ValueError())
    again = f"--resume {tmp_path / 'step-00000005'} --user_dir '/my lab' --plugins no:plot /mine.py:shout\n"
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
    for step, loss in ((5, 2.0), (10, 1.5)):
        plugin.panda_evaluation(run, evaluation(step, loss))
        assert capsys.readouterr().out == f"step {step}/10  evaluation loss {loss:.4f}  0.2 s\n"
    plugin.panda_log(run, record(10))
    plugin.panda_run_end(run)
    assert "\nevaluation loss 1.5000 at step 10\n" in capsys.readouterr().out


def test_an_evaluation_stands_above_the_bar(make_run: Any, evaluation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal)
    run = make_run()
    plugin = started(run)
    plugin.panda_evaluation(run, evaluation(5))
    plugin.panda_run_end(run)
    assert "step 5/10  evaluation loss 1.5000" in terminal.getvalue()
