"""A rank that is stopped, sleeps for ever, is killed or fails: the terminal says which and where, and the run ends."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from launching import BIN
from launching import start

from panda.testing.processes import Started

TROUBLE = """\
import os
import time

from panda.registry import hookimpl
from panda.registry import register_plugin


@register_plugin("trouble")
class Trouble:
    def __init__(self, options, context):
        pass

    @hookimpl
    def panda_step_start(self, run, step):
        if step == 2 and run.processes.rank == 1:
            {}
"""
RUN: tuple[object, ...] = (
    *("--arch", "llama-tiny", "--num_layers", 1, "--hidden_size", 16, "--intermediate_size", 24, "--num_heads", 2),
    *("--instruction_tuning_data_dir", "panda:data/sample/instruct", "--max_seq_length", 32, "--max_samples", 64),
    *("--gradient_accumulation_steps", 1, "--max_steps", 3, "--num_workers", 0, "--save_final", "false"),
    *("-p", "no:plot", "-p", "no:tensorboard", "--plugins", "./trouble.py:trouble", "--output_dir", "run"),
)


def begin(tmp_path: Path, trouble: str, minutes: float) -> Any:
    """Two ranks, of which rank 1 has ``trouble`` in step 2."""
    (tmp_path / "trouble.py").write_text(TROUBLE.format(trouble))
    return start(BIN / "panda-train", *RUN, "--timeout", minutes, cwd=tmp_path, ranks=2)


def assert_ended(started: Started, *codes: int) -> None:
    """Each rank has its exit code; or, where the machine is slow, was killed after another, as launchers do."""
    found = started.ended or []
    assert found.count(-signal.SIGKILL) < len(codes) or -signal.SIGKILL in codes
    assert all(own in (code, -signal.SIGKILL) for own, code in zip(found, codes, strict=True)), found


def wait_for(started: Started, text: str) -> None:
    until = time.monotonic() + 120
    while text not in started.stderr.read_text():
        assert time.monotonic() < until, started.stdout.read_text() + started.stderr.read_text()
        time.sleep(0.1)


def test_a_rank_that_was_stopped_is_named_and_then_the_first_signal_ends_the_run(tmp_path: Path) -> None:
    with begin(tmp_path, "time.sleep(2); os.kill(os.getpid(), 19)", 0.2) as started:
        wait_for(started, ", stopped by a signal: ")
        os.kill(started.pids[0], signal.SIGTERM)
        done = started.wait()
    assert started.ended == [128 + signal.SIGTERM, -signal.SIGKILL], done.stderr
    [line] = [line for line in done.stderr.splitlines() if "stopped by a signal" in line and "warning" in line]
    assert line.startswith("warning: rank 1 has not arrived for ") and "; rank 0 waits: step 2, panda/engine/" in line
    assert "ended at once by SIGTERM, without saving, since rank 1 has not arrived" in done.stderr
    assert "Traceback" not in done.stderr and "the run ends after this step" not in done.stdout


def test_a_rank_that_sleeps_is_named_with_its_place_and_ends_the_run_after_the_timeout(tmp_path: Path) -> None:
    with begin(tmp_path, "time.sleep(1000)", 0.2) as started:
        done = started.wait()
    assert_ended(started, 2, 1)
    place = f"{tmp_path / 'trouble.py'}:16 (panda_step_start)"
    assert f"without doing anything: step 2, {place}; rank 0 waits: step 2, panda/engine/processes.py:" in done.stderr
    *_, others, last = done.stderr.splitlines()
    assert others == "rank 1 ends because the run has not gone on for 12 s"
    assert last.startswith("error: the run has not gone on for 12 s (`timeout`): rank 1 has not arrived for ")
    assert place in last and "Traceback" not in done.stderr and "gloo" not in done.stderr


def test_a_rank_that_is_killed_is_named_by_another(tmp_path: Path) -> None:
    with begin(tmp_path, "time.sleep(6); os.kill(os.getpid(), 9)", 0.5) as started:  # reported 4 s later at most
        done = started.wait()
    assert_ended(started, 2, -signal.SIGKILL)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: rank 1 was killed; last seen: step 2, {tmp_path / 'trouble.py'}:16 ")
    assert "Traceback" not in done.stderr and "gloo" not in done.stderr


def test_the_last_words_are_those_of_the_rank_that_failed(tmp_path: Path) -> None:
    with begin(tmp_path, "raise ValueError('an egret')", 0.5) as started:
        done = started.wait()
    assert_ended(started, 1, 1)
    assert done.stderr.count("Traceback") == 1 and "gloo" not in done.stderr
    before, after = done.stderr.replace("[rank1]: ", "").split("Traceback")  # torch marks each line so
    assert before.splitlines()[-1] == "rank 0 ends because rank 1 failed"
    assert "ValueError: an egret" in after and "rank 0" not in after


def test_a_rank_that_never_starts_is_named_and_ends_the_run_in_words(tmp_path: Path) -> None:
    (tmp_path / "trouble.py").write_text(TROUBLE.format("pass"))
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    with start(BIN / "panda-train", *RUN, "--timeout", 0.03, cwd=tmp_path, **place) as started:
        done = started.wait()
    assert done.returncode == 2
    at = f"127.0.0.1:{store.port} (MASTER_ADDR and MASTER_PORT)"
    assert f"waiting: rank 1 has not arrived at {at}: 1 of 2 are here (WORLD_SIZE)\n" in done.stderr
    assert f"error: rank 1 has not arrived at {at} within 2 s (`timeout`)" in done.stderr
    assert "Traceback" not in done.stderr
