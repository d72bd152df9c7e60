"""A full disk is recognised however a library reports it; other errors pass."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import pytest
import torch

from panda.files.disk_full import _STATES
from panda.files.disk_full import SHARED_MEMORY_FULL
from panda.files.disk_full import disk_full
from panda.files.disk_full import out_of_reach
from panda.files.disk_full import writing
from panda.registry import UserError

FullDisk = Callable[[int], AbstractContextManager[None]]


def refused(path: Path, write: Callable[[], None], full_disk: FullDisk) -> str:
    with pytest.raises(UserError) as caught, full_disk(10), writing(f"{path}: the picture", "Go on."):
        write()
    return str(caught.value)


def test_what_the_system_reports(tmp_path: Path, full_disk: FullDisk) -> None:
    message = refused(tmp_path, lambda: (tmp_path / "a").write_bytes(bytes(100)) and None, full_disk)
    said = "the picture cannot be written: the disk is full. Make room, or name a folder on another disk. Go on."
    assert message == f"{tmp_path}: {said}"


@pytest.mark.parametrize("number", _STATES)
def test_room_is_advised_only_where_the_disk_is_full(number: int) -> None:
    with pytest.raises(UserError) as caught, writing("a", "Go on."):
        raise OSError(number, os.strerror(number), "a")
    assert ("Make room" in str(caught.value)) == (number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    assert str(caught.value).endswith(" name a folder on another disk. Go on.") or number == errno.EIO


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_the_file_is_named_where_it_is_known(number: int) -> None:
    assert disk_full(OSError(number, os.strerror(number), "a", None, "b")) == "the disk is full (b)"
    assert disk_full(OSError(number, os.strerror(number), "a")) == "the disk is full (a)"


def test_what_copying_a_folder_reports(tmp_path: Path, full_disk: FullDisk) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "a").write_bytes(bytes(100))
    copy = refused(tmp_path, lambda: shutil.copytree(tmp_path / "from", tmp_path / "to") and None, full_disk)
    assert "the disk is full" in copy


def test_what_libraries_report(tmp_path: Path, full_disk: FullDisk) -> None:
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(10_000)}
    for save in (lambda: save_file(tensors, tmp_path / "a"), lambda: torch.save(tensors, tmp_path / "b")):
        assert "the picture cannot be written: the disk is full" in refused(tmp_path, save, full_disk)


def test_what_another_error_hides() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    try:
        try:
            raise full
        except OSError as problem:
            raise RuntimeError("could not save") from problem
    except RuntimeError as problem:
        assert disk_full(problem) == "the disk is full"


def test_what_was_said_already_is_not_said_again() -> None:
    with pytest.raises(UserError, match=r"^The picture needs room\.$"), writing("a", "b"):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise UserError("The picture needs room.") from None


def test_other_errors_pass() -> None:
    for error in (OSError(errno.EACCES, "Permission denied"), UserError("No space left on device"), KeyError("28")):
        with pytest.raises(type(error)) as caught, writing("a", "b"):
            raise error
        assert caught.value is error
    assert disk_full(OSError(errno.EACCES, "Permission denied")) is None


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EIO, "the disk is failing"), (errno.EROFS, "the disk can only be read"), (errno.ESTALE, "has lost it")],
)
def test_a_disk_that_fails_is_said_as_such(number: int, said: str) -> None:
    with pytest.raises(UserError, match=rf"a cannot be written: .*{said}.*\(out/x\)\. .*disk.* b$"), writing("a", "b"):
        raise OSError(number, os.strerror(number), "out/x")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", b"/a/b"), "/a/b: this user may not read or enter it"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000), f"{'x' * 200}...: the name is too long"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", Path("a")), "a: links that lead to each other"),
        (PermissionError(errno.EACCES, "Permission denied"), None),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), None),
        (KeyError(errno.EACCES), None),
    ],
)
def test_a_file_that_is_out_of_reach_is_named(error: BaseException, said: str | None) -> None:
    found = out_of_reach(error)
    assert found is None if said is None else found is not None and found.startswith(said)


def test_full_shared_memory_is_no_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch and NCCL say it, and semaphores, whose error names no file."""
    of_torch = "unable to allocate shared memory(shm) for file </torch_32_1_0>: No space left on device (28)"
    of_nccl = "Error while creating shared memory segment /dev/shm/nccl-a, error: No space left on device (28)"
    for text in (of_torch, of_nccl):
        assert disk_full(RuntimeError(text)) == SHARED_MEMORY_FULL


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, ", is full"), (errno.EROFS, ": the disk can only be read")]
)
def test_a_semaphore_is_of_shared_memory(number: int, said: str) -> None:
    def full() -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(UserError, match=rf"^/dev/shm, the shared memory .*{said}") as caught, writing("a", "b"):
        compiled = compile("full()", "multiprocessing/synchronize.py", "exec")
        try:
            exec(compiled, {"full": full})
        except OSError as problem:
            raise problem.with_traceback(problem.__traceback__ and _without_last(problem.__traceback__)) from None
    assert "num_workers" in str(caught.value)


def _without_last(trace: TracebackType) -> TracebackType:
    """C code, which raises it really, has no frame."""
    last = trace
    while last.tb_next is not None and last.tb_next.tb_next is not None:
        last = last.tb_next
    last.tb_next = None
    return trace


@pytest.mark.parametrize(("call", "is_printing"), [("print", True), ("fingerprint", False)])
def test_a_call_that_only_ends_in_print_does_not_print(call: str, is_printing: bool, tmp_path: Path) -> None:
    def full(text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "line.py").write_text(f"{call}('x')\n")  # from which the traceback reads the line
    try:
        exec(compile(f"{call}('x')\n", str(tmp_path / "line.py"), "exec"), {call: full})
    except OSError as problem:
        assert problem.__traceback__ is not None and problem.__traceback__.tb_next is not None
        problem.__traceback__.tb_next.tb_next = None  # as C code, which has no frame
        said = disk_full(problem) or ""
    assert said.startswith("what is printed") == is_printing, said
