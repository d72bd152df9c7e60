"""Changes one bit of a file of a checkpoint, and asks whether that is found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from panda.engine.checkpoints.manifest import DamagedError
from panda.engine.checkpoints.manifest import check_contents


@contextmanager
def flipped(file: Path, bit: int) -> Iterator[None]:
    """In the meantime ``bit`` of ``file`` is another. Written in place: ext4 syncs a file that is written again."""
    with file.open("r+b", buffering=0) as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0]
        for value in (byte ^ 1 << bit % 8, byte):
            stream.seek(bit // 8)
            stream.write(bytes([value]))
            if value != byte:
                yield


def is_found(checkpoint: Path, file: Path) -> bool:
    """Whether ``file`` is found to be damaged. Without pytest.raises, which takes longer than the check."""
    try:
        check_contents(checkpoint, [file])
    except DamagedError:
        return True
    return False
