"""What all commands share: streams whose encoding lacks a character."""

from __future__ import annotations

import errno
import gc
import io
import os
import subprocess
import sys

import pytest

from panda.cli import command
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


def test_a_command_asks_once_for_a_short_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("atexit.register", asked.append)
    command._end_soon.cache_clear()
    for _ in range(2):
        run_command(lambda argv: None, [])
    assert asked == [gc.freeze]


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert printable("a\tb\n竹 é") == "a\tb\n竹 é"
    assert printable("\x1b[2J\x00\r\x7f\x9b") == "\\x1b[2J\\x00\\r\\x7f\\x9b"
    assert printable("x\u202ey\u2066\u200f") == "x\\u202ey\\u2066\\u200f"


@pytest.mark.parametrize(("rank", "met", "waits"), [("0", False, []), ("1", False, [2.0]), ("1", True, [])])
def test_a_mistake_of_every_rank_is_left_to_rank_0_before_they_meet(
    rank: str, met: bool, waits: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its launcher ends the others while they wait; what only one of them finds is printed after that."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delitem(sys.modules, "panda.engine.meeting", raising=False)
    if met:
        monkeypatch.setitem(sys.modules, "panda.engine.meeting", sys.modules[__name__])

    def wrong(argv: list[str]) -> None:
        raise UserError("no such optimizer")

    assert run_command(wrong, []) == 2
    assert waited == waits
    prefix = "error" if rank == "0" else "error on rank 1"
    assert capsys.readouterr().err == f"{prefix}: no such optimizer\n"


def test_a_file_out_of_reach_is_the_users_and_a_missing_one_is_a_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(argv: list[str]) -> None:
        error = OSError(int(argv[0]), "as the system says", "/data/x")
        error.add_note("This came out of the reader 'acme'.")
        raise error

    assert run_command(command, [str(errno.EACCES)]) == 2
    said = capsys.readouterr().err
    assert said == (
        "error: /data/x: this user may not read or enter it (permission denied).\n"
        "  This came out of the reader 'acme'.\n  PANDA_TRACEBACK=1 shows who wanted it.\n"
    )
    with pytest.raises(FileNotFoundError):
        run_command(command, [str(errno.ENOENT)])
    monkeypatch.setenv("PANDA_TRACEBACK", "1")
    with pytest.raises(PermissionError):
        run_command(command, [str(errno.EACCES)])


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_said_of_what_is_printed(unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "panda", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    said = "error: what is printed cannot be written: the disk is full. Send stdout and stderr to another place.\n"
    assert (done.stderr, done.returncode) == (said, 2)


@pytest.mark.parametrize("given", [["panda.cli.main", "list"], ["panda.cli.train", "--help"]])
def test_ctrl_c_while_a_command_is_imported_is_no_traceback(given: list[str]) -> None:
    """On a slow disk that takes seconds."""
    code = (
        "import os, signal, sys\n"
        "class Signal:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name in ('panda.cli.list', 'panda.configuration.arguments'):\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Signal())\n"
        f"from {given[0]} import main\n"
        f"sys.exit(main({given[1:]}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
