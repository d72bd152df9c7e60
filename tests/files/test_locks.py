"""Locks: one holder at a time, named, and freed however the holder ends."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from panda.files import locks
from panda.files.locks import HeldError
from panda.files.locks import held
from panda.files.locks import holder_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.lock"


def forked(do: Callable[[], None]) -> tuple[int, Callable[[], None]]:
    """A child that does ``do`` and then waits: its number, once it has, and a function that ends it."""
    (can_end, end), (is_done, done) = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.close(end)
            do()
            os.write(done, b".")
            os.read(can_end, 1)
        finally:
            os._exit(0)
    os.close(done)
    os.close(can_end)
    assert os.read(is_done, 1) == b"."
    os.close(is_done)
    return child, lambda: (os.close(end), os.waitpid(child, 0))[0]


def test_one_holds_it_at_a_time_and_is_named(file: Path) -> None:
    with held(file) as is_held:
        assert is_held is True
        for _ in range(2):  # the first attempt leaves the name of the holder
            with pytest.raises(HeldError, match=rf"^process {os.getpid()} on .*, since 20\d\d-"), held(file):
                pytest.fail("it is held twice")
        assert str(holder_of(file)).startswith(f"process {os.getpid()} on ")
    assert holder_of(file) is None
    assert file.read_text() == ""
    with held(file):
        pass


def test_nothing_is_left_of_the_name_of_one_that_was_killed(file: Path) -> None:
    file.write_text("x" * 300)
    with held(file):
        assert "x" not in str(holder_of(file)).partition("since")[2]


def test_the_rank_of_the_holder_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    with held(file):
        assert " (rank 3), since " in str(holder_of(file))


def test_an_error_frees_it(file: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(file):
        raise ZeroDivisionError
    assert holder_of(file) is None


def test_looking_makes_no_file(file: Path) -> None:
    assert holder_of(file) is None
    assert not file.exists()


def test_a_holder_that_is_killed_frees_it(file: Path) -> None:
    stack = ExitStack()
    child, reap = forked(lambda: stack.enter_context(held(file)) and None)
    assert str(holder_of(file)).startswith(f"process {child} on ")
    os.kill(child, signal.SIGKILL)
    reap()
    assert holder_of(file) is None
    with held(file):
        assert str(holder_of(file)).startswith(f"process {os.getpid()} on ")


def test_a_forked_process_does_not_hold_it_on(file: Path) -> None:
    """Processes that prepare batches outlive a run that is killed, by seconds."""
    pipe = os.pipe()

    def hold_and_fork() -> None:
        ExitStack().enter_context(stack)
        stack.enter_context(held(file))
        grandchild, _ = forked(lambda: None)
        os.write(pipe[1], str(grandchild).encode())

    stack = ExitStack()
    child, reap = forked(hold_and_fork)
    grandchild = int(os.read(pipe[0], 20))
    assert str(holder_of(file)).startswith(f"process {child} on ")
    os.kill(child, signal.SIGKILL)
    reap()
    try:
        os.kill(grandchild, 0)  # it lives
        assert holder_of(file) is None
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_a_forked_process_that_leaves_the_block_frees_nothing(file: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(held(file))

        def leave() -> None:
            with file.with_name("other").open("w") as other:  # in place of the descriptor that was closed
                other.write("text")
                other.flush()
                stack.close()
                other.write(" and more")

        _, reap = forked(leave)
        assert str(holder_of(file)).startswith(f"process {os.getpid()} on ")
        reap()
    assert file.with_name("other").read_text() == "text and more"
    assert holder_of(file) is None


def test_who_waits_is_told_once_for_whom_and_gets_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.01)
    told: list[str] = []
    is_told, got = threading.Event(), threading.Event()

    def tell(holder: str) -> None:
        told.append(holder)
        is_told.set()

    def wait() -> None:
        with held(file, waiting=tell):
            got.set()

    waiter = threading.Thread(target=wait, daemon=True)
    with held(file):
        waiter.start()
        assert is_told.wait(60)
        assert not got.wait(0.1)
    assert got.wait(60)
    waiter.join()
    assert len(told) == 1 and told[0].startswith(f"process {os.getpid()} on ")


def test_who_holds_it_for_an_instant_does_not_count(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as other:
        other.enter_context(held(file))
        monkeypatch.setattr("panda.files.locks.time.sleep", lambda seconds: other.close())
        with held(file, waiting=lambda holder: pytest.fail("told")) as is_held:
            assert is_held


def test_a_full_disk_does_not_keep_from_holding(file: Path, full_disk: Callable[[int], ExitStack]) -> None:
    with full_disk(0), held(file) as is_held:
        assert is_held
        assert holder_of(file) == "another process"


def test_a_folder_that_is_missing_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), held(tmp_path / "missing" / "a.lock"):
        pass


def test_where_there_are_no_locks_it_goes_on_and_says_so(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none_here(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none_here)
    with held(file, unlocked="take turns.") as is_held:
        assert is_held is False
        assert holder_of(file) is None
    note = f"note: {file.parent}: cannot be locked (Function not implemented): take turns.\n"
    assert capsys.readouterr() == ("", note)
    with held(file):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_lock_that_is_removed_at_the_end_still_excludes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waited has an open file that is gone, and takes the one that is there then."""
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.01)
    waits, got = threading.Event(), threading.Event()

    def wait() -> None:
        with held(file, waiting=lambda holder: waits.set(), removed=True):
            assert holder_of(file) is not None
            got.set()

    waiter = threading.Thread(target=wait, daemon=True)
    with held(file, removed=True):
        waiter.start()
        assert waits.wait(60)
    waiter.join(60)
    assert got.is_set() and not file.exists()
