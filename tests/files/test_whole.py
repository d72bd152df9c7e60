"""Whole or not at all, at whatever call to the system the process fails or dies."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from panda.files.whole import check_can_be_made
from panda.files.whole import remove
from panda.files.whole import sync
from panda.files.whole import whole
from panda.files.whole import write_whole
from panda.registry import UserError

OLD, NEW = "old", "new and longer"
CALLS = ((os, "replace"), (os, "fsync"), (Path, "write_text"), (Path, "mkdir"))


def write_file(path: Path, text: str) -> None:
    write_whole(path, text)


def write_folder(path: Path, text: str) -> None:
    with whole(path) as new:
        (new / "inner").mkdir(parents=True)
        (new / "a").write_text(text)
        (new / "inner" / "b").write_text(text)


def content(path: Path) -> str | None:
    """The text of all that is at ``path``; None where nothing is. Fails where it is half one thing and half another."""
    if not path.exists():
        return None
    if path.is_file():
        return path.read_text()
    texts = {file.read_text() for file in (path / "a", path / "inner" / "b")}
    assert len(texts) == 1 and len(list(path.rglob("*"))) == 3
    return texts.pop()


def failing_at(patch: pytest.MonkeyPatch, number: int, fail: Callable[[], None]) -> list[int]:
    """Have call ``number`` of CALLS, counted from 0, do ``fail`` in its place. Holds the number of calls so far."""
    calls = [0]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **keywords: Any) -> Any:
            calls[0] += 1
            if calls[0] == number + 1:
                fail()
            return call(*arguments, **keywords)

        return instead

    for owner, name in CALLS:
        patch.setattr(owner, name, counted(getattr(owner, name)))
    return calls


@pytest.fixture(params=[write_file, write_folder])
def write(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    write: Callable[[Path, str], None] = request.param
    return write


def test_it_is_made_and_replaced(tmp_path: Path, write: Callable[[Path, str], None]) -> None:
    for text in (OLD, NEW):
        write(tmp_path / "it", text)
        assert content(tmp_path / "it") == text
        assert [path.name for path in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize("before", [None, OLD])
def test_where_any_call_fails_the_old_or_the_new_is_there(
    tmp_path: Path, write: Callable[[Path, str], None], before: str | None
) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    number, seen = 0, set()
    while True:
        path = tmp_path / str(number) / "it"
        path.parent.mkdir()
        if before:
            write(path, before)
        with pytest.MonkeyPatch.context() as patch:
            calls = failing_at(patch, number, fail)
            try:
                write(path, NEW)
            except KeyboardInterrupt:
                pass
            else:
                break
        assert content(path) in (before, NEW), number
        seen.add(content(path))
        assert [each.name for each in path.parent.iterdir()] in ([], ["it"]), number
        number += 1
    assert number == calls[0] >= 4 and content(path) == NEW
    assert seen == {before, NEW}


def test_whenever_the_process_is_killed_nothing_is_half_and_the_next_clears_up(
    tmp_path: Path, write: Callable[[Path, str], None]
) -> None:
    number = 0
    while True:
        path = tmp_path / str(number) / "it"
        path.parent.mkdir()
        write(path, OLD)
        if (child := os.fork()) == 0:
            try:
                failing_at(pytest.MonkeyPatch(), number, lambda: os.kill(os.getpid(), signal.SIGKILL))
                write(path, NEW)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if content(path) is None:  # between the two renames
            assert write is write_folder
            assert content(path.with_name(".tmp-old-it")) == OLD and content(path.with_name(".tmp-it")) == NEW
        else:
            assert content(path) in (OLD, NEW)
        write(path, "again")
        assert content(path) == "again"
        write(path, "once more")
        assert [each.name for each in path.parent.iterdir()] == ["it"]
        if not os.WIFSIGNALED(status):
            break
        number += 1
    assert number >= 4


def test_an_error_in_the_body_leaves_what_was_there(tmp_path: Path, write: Callable[[Path, str], None]) -> None:
    write(tmp_path / "it", OLD)
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "it") as new:
        write(new, NEW)
        raise ZeroDivisionError
    assert content(tmp_path / "it") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_all_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, write: Callable[[Path, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (did.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (did.append("replace"), replace(a, b)))
    write(tmp_path / "it", NEW)
    new = f"{tmp_path}/.tmp-it"
    inside = {f"{new}/a", f"{new}/inner", f"{new}/inner/b"} if write is write_folder else set()
    assert set(did[:-3]) == inside
    assert did[-3:] == [new, "replace", str(tmp_path)]


def test_a_link_stays_a_link(tmp_path: Path, write: Callable[[Path, str], None]) -> None:
    """To a larger disk, say, where the new one is made, too."""
    large = tmp_path / "large"
    large.mkdir()
    write(large / "it", OLD)
    (tmp_path / "it").symlink_to(large / "it")
    with whole(tmp_path / "it") as new:
        assert new.parent == large
        write(new, NEW)
    assert (tmp_path / "it").is_symlink()
    assert content(large / "it") == NEW
    assert [path.name for path in large.iterdir()] == ["it"]


def test_of_several_that_make_a_file_at_once_the_last_stays(tmp_path: Path) -> None:
    with whole(tmp_path / "it", alone=False) as first:
        first.write_text("first")
        with whole(tmp_path / "it", alone=False) as second:
            second.write_text("second")
        assert content(tmp_path / "it") == "second"
    assert content(tmp_path / "it") == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_of_several_that_make_a_folder_at_once_the_first_stays(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"not empty|exists"), whole(tmp_path / "it", alone=False) as first:
        write_folder(first, "first")
        with whole(tmp_path / "it", alone=False) as second:
            write_folder(second, "second")
    assert content(tmp_path / "it") == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_a_folder_that_is_removed_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("it", "other"):
        write_folder(tmp_path / name, OLD)
    remove(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["it"]

    def die(path: Path, **keywords: Any) -> None:
        (path / "a").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        remove(tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_a_file_system_that_cannot_sync_folders_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    number = errno.EINVAL
    sync(tmp_path)
    with pytest.raises(OSError, match="Invalid"):
        sync(tmp_path / "file")
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        sync(tmp_path)


def test_what_cannot_be_made_is_said_beforehand_and_nothing_is_left(tmp_path: Path) -> None:
    check_can_be_made(tmp_path / "a" / "b", "output")
    check_can_be_made(tmp_path, "output")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^output: cannot make .*file is a file\.$"):
        check_can_be_made(tmp_path / "file" / "a", "output")
    with pytest.raises(UserError, match=r"^output: cannot make '/proc/a': /proc: "):
        check_can_be_made(Path("/proc/a"), "output")  # where even root makes nothing


def test_what_only_its_owner_may_read_follows_the_umask(tmp_path: Path) -> None:
    """As safetensors writes it."""
    before = os.umask(0o027)
    try:
        with whole(tmp_path / "folder") as new:
            new.mkdir()
            (new / "weights").touch(mode=0o600)
            (new / "program").touch(mode=0o700)
        assert os.umask(0o027) == 0o027, "it is left as it was"
    finally:
        os.umask(before)
    assert (tmp_path / "folder" / "weights").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder" / "program").stat().st_mode & 0o777 == 0o700
