"""Files of a checkpoint as this rank writes them, with the sha256 of each."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO
from typing import Any
from typing import cast

import torch

from panda.engine.checkpoints.folders import Written


class HashedFiles:
    """What this rank has written to the folder of a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: dict[str, Written] = {}
        """By path in the folder."""

    def save(self, content: Any, path: Path, **how: Any) -> None:
        """``torch.save(content, path, **how)``, hashed as it is written: what the disk gets wrong is found later."""
        with path.open("wb") as file:
            hashed = _Hashed(file)
            torch.save(content, cast(IO[bytes], hashed), **how)
        self._record(path, hashed.size, hashed.digest.hexdigest())

    def add(self, path: Path) -> None:
        """Record the file ``path``, which this rank has written."""
        with path.open("rb") as file:
            self._record(path, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())

    def _record(self, path: Path, size: int, sha256: str) -> None:
        self.written[str(path.relative_to(self.folder))] = Written(size, sha256)


class _Hashed:
    """A file that is written from its beginning to its end, as torch.save does."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, content: Any) -> int:
        self.digest.update(content)
        self.size += len(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()
