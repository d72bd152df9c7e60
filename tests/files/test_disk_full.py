"""A full disk is recognised however a library reports it; other errors pass."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from panda.files.disk_full import disk_full
from panda.files.disk_full import writing
from panda.registry import UserError

FullDisk = Callable[[int], AbstractContextManager[None]]


def refused(path: Path, write: Callable[[], None], full_disk: FullDisk) -> str:
    with pytest.raises(UserError) as caught, full_disk(10), writing(f"{path}: the picture", "Make room."):
        write()
    return str(caught.value)


def test_what_the_system_reports(tmp_path: Path, full_disk: FullDisk) -> None:
    message = refused(tmp_path, lambda: (tmp_path / "a").write_bytes(bytes(100)) and None, full_disk)
    assert message == f"{tmp_path}: the picture cannot be written: the disk is full. Make room."


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_the_file_is_named_where_it_is_known(number: int) -> None:
    assert disk_full(OSError(number, os.strerror(number), "a", None, "b")) == "the disk is full (b)"
    assert disk_full(OSError(number, os.strerror(number), "a")) == "the disk is full (a)"


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ESTALE])
def test_a_disk_that_fails_is_told_as_such(tmp_path: Path, number: int) -> None:
    assert disk_full(OSError(number, os.strerror(number), "a")) == f"the disk fails (a): {os.strerror(number)}"
    with (
        pytest.raises(UserError, match=r"^x cannot be written: the disk fails \(a\): .*\. Look\.$"),
        writing("x", "Look."),
    ):
        raise OSError(number, os.strerror(number), "a")


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
