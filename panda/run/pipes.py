"""Data that comes through a pipe, ``<(zcat x.gz)``: it can be read only once, so it is kept as a file. No torch."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from panda.data.reading import WINDOW
from panda.files.disk_full import disk_full
from panda.registry import UserError
from panda.registry.location import resolve_path

FOLDER = "pipes"
"""The folder in the token cache that has what came through pipes."""
DESCRIPTORS = ("/dev/fd/", "/proc/self/fd/")


def is_pipe(location: str, key: str) -> bool:
    """Whether ``location`` is a pipe. Raises UserError for one that this process cannot read by itself."""
    path = resolve_path(location)
    try:
        is_one = stat.S_ISFIFO(path.stat().st_mode)
    except (OSError, ValueError):
        is_one = location.startswith(DESCRIPTORS)  # of the process that the shell started, which a launcher closes
        if not is_one:
            return False
    else:
        if not is_one or os.environ.get("WORLD_SIZE", "1") == "1":
            return is_one
    raise UserError(
        f"{key}: {location!r} is a pipe, which only one process can read. Keep its content first: `panda prepare CONFIG"
        f" --{key} <(...)` says in which file, to name here. Or write it into a file."
    )


def keep(location: str, folder: Path, key: str) -> Path:
    """The file in ``folder`` with what comes through the pipe ``location``, named by a hash of it."""
    print(f"{key}: reading {location}, a pipe, until it ends", flush=True)
    hashed, new, size = hashlib.sha256(), None, 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, new = tempfile.mkstemp(prefix=".tmp-", dir=folder)
        with resolve_path(location).open("rb") as pipe, open(descriptor, "wb") as file:
            while piece := pipe.read(WINDOW):
                size += len(piece)
                hashed.update(piece)
                file.write(piece)
        if not size:
            raise UserError(f"{key}: nothing came through the pipe {location!r}. Does its command fail?")
        ending = "".join(Path(location).suffixes[-2:])
        kept = (folder / f"{hashed.hexdigest()[:32]}{ending}").absolute()
        os.replace(new, kept)
    except OSError as problem:
        raise UserError(
            f"{key}: the content of the pipe {location!r} cannot be kept in {str(folder)!r}:"
            f" {disk_full(problem) or problem.strerror}. Set `token_cache` to a folder with room for it."
        ) from None
    finally:
        if new is not None:
            with suppress(FileNotFoundError):  # it has its name
                os.unlink(new)
    print(f"{key}: it is kept as {kept}, which the run's config.yaml names", flush=True)
    return kept
