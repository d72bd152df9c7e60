"""Fails or ends a process at a chosen call to the file system, of those that write below a folder.

What Python calls is counted: opening to write, each write that reaches the system, syncing, renaming, removing,
making folders, truncating, copying; and a file of safetensors, which Rust writes, as one write.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXIT_CODE = 99
WAYS = ("exit", "ENOSPC", "EIO")
"""What happens at the call: the process ends there, or the system reports a full or a failing disk."""

_BY_PATH = ("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "truncate")
_BY_DESCRIPTOR = ("fsync", "ftruncate", "pwrite")


class FailingCalls:
    """Counts the calls that change something below ``root``; ``way`` happens at call ``number``, counted from 1.

    A write fails or ends after half of it has been written.
    """

    def __init__(self, root: Path, number: int = 0, way: str = "exit") -> None:
        self.root, self.number, self.way = str(root), number, way
        self.made: list[str] = []
        """The calls so far, each as ``NAME PATH``."""

    def install(self) -> None:
        """From here on, until the process ends."""
        import safetensors.torch as written_by_rust

        for name in _BY_PATH:
            setattr(os, name, self._by_path(name, getattr(os, name)))
        for name in _BY_DESCRIPTOR:
            setattr(os, name, self._by_descriptor(name, getattr(os, name)))
        os.sendfile = self._by_descriptor("sendfile", os.sendfile)  # type: ignore[assignment]
        opened = self._opened(io.open)
        builtins.open = io.open = opened
        os.open = self._opened_descriptor(os.open)  # type: ignore[assignment]
        written_by_rust.serialize_file = self._serialized(written_by_rust.serialize_file)

    def at(self, name: str, path: str, half: Callable[[], object] = lambda: None) -> None:
        """Count the call ``name`` on ``path``, and do what is to happen at it. ``half`` does a part of its work."""
        if not path.startswith(self.root):
            return
        self.made.append(f"{name} {path.removeprefix(self.root)}")
        if len(self.made) != self.number:
            return
        half()
        if self.way == "exit":
            os._exit(EXIT_CODE)
        code = getattr(errno, self.way)
        raise OSError(code, os.strerror(code), path)

    def _by_path(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(path: Any, *rest: Any, **keywords: Any) -> Any:
            self.at(name, _absolute(path, keywords.get("dir_fd")))
            return call(path, *rest, **keywords)

        return instead

    def _by_descriptor(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(descriptor: int, *rest: Any, **keywords: Any) -> Any:
            self.at(name, _of(descriptor))
            return call(descriptor, *rest, **keywords)

        return instead

    def _opened_descriptor(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(path: Any, flags: int, *rest: Any, **keywords: Any) -> Any:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.at("open", _absolute(path, keywords.get("dir_fd")))
            return call(path, flags, *rest, **keywords)

        return instead

    def _serialized(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(tensors: Any, path: Any, *rest: Any, **keywords: Any) -> Any:
            def half() -> None:
                call(tensors, path, *rest, **keywords)
                os.truncate(path, os.path.getsize(path) // 2)

            self.at("write", _absolute(path), half)
            return call(tensors, path, *rest, **keywords)

        return instead

    def _opened(self, call: Callable[..., Any]) -> Any:
        calls = self

        class Raw(io.FileIO):
            def write(self, content: Any) -> int:
                calls.at(
                    "write", _of(self.fileno()), lambda: super(Raw, self).write(bytes(content)[: len(content) // 2])
                )
                return super().write(content)

        def instead(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **keywords: Any) -> Any:
            names = ("encoding", "errors", "newline", "closefd", "opener")
            given = dict(zip(names, rest, strict=False)) | keywords
            path = _of(file) if isinstance(file, int) else _absolute(file)
            if not set(mode) & set("wax+") or not path.startswith(self.root):
                return call(file, mode, buffering, **given)
            if not isinstance(file, int):
                self.at("open", path)
            raw = Raw(
                file, mode.replace("b", "").replace("t", ""), given.pop("closefd", True), given.pop("opener", None)
            )
            if buffering == 0:
                return raw
            size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
            buffered = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, line_buffering=buffering == 1, **given)

        return instead


def _absolute(path: Any, folder: int | None = None) -> str:
    path = os.fsdecode(path) if not isinstance(path, int) else _of(path)
    return os.path.join(_of(folder), path) if folder is not None else os.path.abspath(path)


def _of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""
