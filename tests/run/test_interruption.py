"""The first SIGINT or SIGTERM finishes the step and saves, and the line that is printed goes on; the second ends."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from launching import BIN
from launching import assert_same_end
from launching import metrics
from launching import start
from launching import train_many

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import configure
from panda.engine.checkpoints.folders import complete_checkpoints
from panda.engine.checkpoints.manifest import read_manifest
from panda.engine.checkpoints.writing import save_checkpoint
from panda.engine.processes import Processes
from panda.registry.errors import EndedBySignal
from panda.run import loop
from panda.run.interruption import PASSED_ON
from panda.run.interruption import SAVED
from panda.run.interruption import Ending
from panda.run.interruption import Interrupted
from panda.run.interruption import Interruption
from panda.run.loop import Loop
from panda.runner import train

SENDER = """
import os
import signal
import time

from panda.registry import hookimpl
from panda.registry import register_plugin


@register_plugin("sender")
class Sender:
    def __init__(self, options, context):
        pass

    @hookimpl
    def panda_step_start(self, run, step):
        if step == 3 and run.processes.rank == run.processes.world_size - 1:
            for child in open(f"/proc/self/task/{os.getpid()}/children").read().split():
                os.kill(int(child), signal.SIGTERM)  # as a scheduler does
            for _ in range(2 if "PANDA_SIGNALS_ARE_PASSED_ON" in os.environ else 1):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
"""
RUN: tuple[object, ...] = (
    *("--arch", "llama-tiny", "--num_layers", 1, "--hidden_size", 32, "--intermediate_size", 48, "--num_heads", 2),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 48, "--zero_stage", 1),
    *("--gradient_accumulation_steps", 2, "--max_steps", 5, "--prompts", "a", "--eval_fraction", 0.1),
    *("--eval_steps", 3, "-p", "no:plot", "-p", "no:tensorboard"),
)
PLACE = "it's a run"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_to_one_rank_saves_on_all_and_the_printed_line_goes_on(tmp_path: Path, ranks: int) -> None:
    (tmp_path / "sender.py").write_text(SENDER)
    plain = [*RUN, "--num_workers", 0, "--output_dir", tmp_path / "plain"]
    train_many([plain], ranks=ranks, cwd=tmp_path)
    flags = [*RUN, "--num_workers", 1, "--plugins", "./sender.py:sender", "metrics", "progress"]
    several = {"ranks": ranks} if ranks > 1 else {PASSED_ON: "1"}  # the signal comes twice, as that of a sweep does
    with start(BIN / "panda-train", *flags, "--output_dir", PLACE, cwd=tmp_path, **several) as started:
        done = started.wait()
        assert started.ended == [SAVED] * ranks, done.stdout + done.stderr
    saved = tmp_path / PLACE / "checkpoints/step-00000003"
    assert [path.name for path in complete_checkpoints(saved.parent)] == [saved.name]
    assert not (tmp_path / PLACE / "export").exists()
    assert (
        f"SIGTERM: the run has ended after step 3 of 5, and {PLACE}/checkpoints/step-00000003 is saved" in done.stdout
    )
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("to continue it: ")]
    words = shlex.split(line.removeprefix("to continue it: "))
    program = words.index(next(word for word in words if word.endswith("panda-train")))
    assert (words[0].endswith("torchrun"), program) == ((True, 5) if ranks == 2 else (False, 0))
    assert words[program + 1 : program + 3] == ["--resume", str(tmp_path / PLACE)]
    (tmp_path / "elsewhere").mkdir()
    elsewhere = tmp_path / "elsewhere"
    with start(BIN / "panda-train", *words[program + 1 :], cwd=elsewhere, ranks=ranks * (ranks > 1)) as started:
        done = started.wait()
    assert done.returncode == 0, done.stderr
    assert_same_end(tmp_path / PLACE, tmp_path / "plain", after=0)
    assert evaluations(tmp_path / PLACE) == evaluations(tmp_path / "plain")


def evaluations(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["eval_loss"]) for record in metrics(run) if "eval_loss" in record]


def test_hours_end_a_run_and_minutes_save_one(
    processes: Processes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    few = [*map(str, RUN[:-6]), "--num_workers", "0", "-p", "no:plot", "-p", "no:tensorboard", "--output_dir", str(run)]
    with pytest.raises(Interrupted, match="max_train_hours: 1e-09: the run has ended after step 1 of 5"):
        train(configure(parse_arguments([*few, "--max_train_hours", "1e-9", "--save_steps", "2"])))
    assert [path.name for path in complete_checkpoints(run / "checkpoints")] == ["step-00000001"]

    again = ["--resume", str(run), "--max_train_hours", "1", "--save_minutes", "1e-9"]
    assert train(configure(parse_arguments(again))) is not None
    left = {path.name: read_manifest(path).passing for path in complete_checkpoints(run / "checkpoints")}
    changed = json.loads((run / "provenance.json").read_text())["changed"]
    assert changed == {
        "max_train_hours": {"before": 1e-09, "now": 1.0},
        "save_minutes": {"before": 30.0, "now": 1e-09},
    }
    first, *later = metrics(run)[1:]  # after that of the step before the resumption
    assert first["resume_seconds"] > 0 and "save_seconds" not in first and "resume_seconds" not in later[0]
    assert all(record["save_seconds"] > 0 for record in later if "loss" in record)
    end = json.loads((run / "provenance.json").read_text())["end"]
    assert end["resume_seconds"] == first["resume_seconds"]
    assert end["save_seconds"] > sum(record.get("save_seconds", 0) for record in later)
    said = capsys.readouterr().out
    assert "changed     max_train_hours was 1e-09 and is 1.0\n            save_minutes was 30.0 and is 1e-09\n" in said
    # Steps 3 and 5 were saved because of the time, and 3 removed again; 1, those of `save_steps` and the last one stay.
    assert left == dict.fromkeys(("step-00000001", "step-00000002", "step-00000004", "step-00000005"), False)


@pytest.mark.parametrize("meanwhile", ["save", "evaluate"])
def test_a_signal_while_a_checkpoint_is_written_is_followed_by_no_further_step(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    usual, saved = getattr(Loop, meanwhile), []

    def signalled(running: Loop, **given: Any) -> None:
        if running.interruption.signal is None:
            os.kill(os.getpid(), signal.SIGTERM)
            while running.interruption.signal is None:  # which a thread hears
                threading.Event().wait(0.01)
        usual(running, **given)

    monkeypatch.setattr(Loop, meanwhile, signalled)
    monkeypatch.setattr(
        loop, "save_checkpoint", lambda *given, **more: saved.append(1) or save_checkpoint(*given, **more)
    )
    few = [*map(str, RUN), "--num_workers", "0", "--output_dir", str(tmp_path / "run"), "--save_steps", "3"]
    with pytest.raises(Interrupted, match=r"SIGTERM: the run has ended after step 3 of 5, .*step-00000003 is saved"):
        train(configure(parse_arguments(few)))
    assert saved == [1]


# -- signals


def ended(body: Any) -> int:
    """The exit code of a fork that runs ``body``."""
    child = os.fork()
    if not child:
        try:
            body()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def twice(first: int, second: int, *, launched: bool) -> Any:
    interruption = Interruption(launched=launched, announce=False)

    def whole() -> None:
        with interruption.listening():
            os.kill(os.getpid(), first)
            while interruption.signal is None:
                threading.Event().wait(0.01)
            os.kill(os.getpid(), second)
            threading.Event().wait(0.5)
        os._exit(interruption.signal)

    return whole


def test_the_second_signal_ends_at_once() -> None:
    assert ended(twice(signal.SIGTERM, signal.SIGINT, launched=False)) == 130
    assert ended(twice(signal.SIGINT, signal.SIGTERM, launched=False)) == 143


def test_under_a_launcher_the_echo_of_a_signal_is_not_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(twice(signal.SIGINT, signal.SIGINT, launched=True)) == signal.SIGINT
    monkeypatch.setattr("panda.run.interruption.ECHO_SECONDS", 0.0)
    assert ended(twice(signal.SIGINT, signal.SIGINT, launched=True)) == 130


def test_the_second_signal_ends_a_process_that_waits_in_c() -> None:
    """Where Python would not run a handler: a rank that waits for one that never comes."""
    code = (
        "import ctypes, os, signal, threading, time\n"
        "from panda.run.interruption import Interruption\n"
        "def send():\n"
        "    time.sleep(0.3); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.3); os.kill(os.getpid(), signal.SIGTERM)\n"
        "with Interruption(launched=False, announce=True).listening():\n"
        "    threading.Thread(target=send).start()\n"
        "    libc = ctypes.CDLL(None)\n"
        "    begun = time.monotonic()\n"
        "    while time.monotonic() - begun < 60: libc.usleep(50_000_000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert done.stdout.startswith("SIGTERM: the run ends after this step, and saves; once more ends it at once")


def test_before_the_steps_a_signal_ends_a_process_that_waits_in_c() -> None:
    code = (
        "import ctypes, os, signal, threading, time\n"
        "from panda.run import interruption\n"
        "interruption.UNHEARD_SECONDS = interruption.LOOK_SECONDS = 0.1\n"
        "with interruption.Ending(launched=True).listening():\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "    {}\n"
    )
    in_c = "mutex = ctypes.create_string_buffer(64)\n    for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(mutex)"
    for waiting, said in ((in_c, "ended by SIGTERM\n"), ("time.sleep(60)", "")):  # or by an exception, as Python has it
        command = [sys.executable, "-c", code.replace("{}", waiting)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (143, said)


def test_before_the_steps_a_signal_is_told_from_code_that_ends_the_process() -> None:
    with Ending(launched=False).listening(), pytest.raises(EndedBySignal) as ended:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert ended.value.code == 143


def test_the_first_signal_ends_at_once_a_run_that_has_lost_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("panda.run.interruption.LOOK_SECONDS", 0.1)

    def signalled(*answers: str | None, is_ending: bool = False) -> Any:
        left = list(answers)
        hopeless = lambda: left.pop(0) if left else answers[-1]  # noqa: E731
        interruption = Interruption(launched=True, announce=False, hopeless=hopeless, is_ending=lambda: is_ending)

        def body() -> None:
            with interruption.listening():
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait(2)

        return body

    assert ended(signalled("rank 1 is lost")) == 143
    assert ended(signalled(None, None, "rank 1 is lost since")) == 143
    assert ended(signalled(None)) == 0
    assert ended(signalled("rank 1 has failed", is_ending=True)) == 0  # which says so, and ends it


def test_signals_to_forks_and_in_threads_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    alone = ended(lambda: os.kill(os.getpid(), signal.SIGTERM))  # a worker of pytest-xdist may have a handler
    interruption = Interruption(launched=False, announce=False)
    with interruption.listening():
        assert ended(lambda: os.kill(os.getpid(), signal.SIGTERM)) == alone
        assert interruption.signal is None
    assert signal.getsignal(signal.SIGTERM) == before

    def elsewhere() -> None:
        with Interruption(launched=False, announce=False).listening():
            heard.append(signal.getsignal(signal.SIGTERM))

    heard: list[Any] = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert heard == [before]
