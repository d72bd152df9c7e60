"""Data sets tokenised once: memory-mapped files, addressed by the content that they were made of.

    CACHE/<key>/token_ids.bin supervised.bin offsets.bin manifest.json
    CACHE/<key>.lock          held by the one process that makes it; the others wait
    CACHE/hashes/             hashes of file contents, remembered by size and time

The key is a hash of all that decides which tokens come out: the bytes of the data, the tokenizer, and
the task with its options. A folder is written under a temporary name and renamed, so it is complete
or absent. Folders can be deleted at any time between runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import BinaryIO

import numpy as np

from panda.data.content_hash import content_hash
from panda.data.content_hash import remember
from panda.data.content_hash import stamp
from panda.data.reading import Reader
from panda.data.token_dataset import DataReport
from panda.data.token_dataset import SampleBlock
from panda.data.token_dataset import TokenDataset
from panda.data.tokenising import Tokenise
from panda.data.tokenising import tokenised_blocks
from panda.registry import UserError
from panda.registry.errors import NO_ROOM

VERSION = 1
"""Raised by whoever changes what tokens a reader or a task of panda's makes of the same data, or the files' layout."""

MANIFEST = "manifest.json"
ARRAYS = ("token_ids", "supervised", "offsets")
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Recipe:
    """Data files and how they become samples."""

    option: str
    """The key that says where the data is, for errors."""
    location: str
    """Its value."""
    files: Sequence[Path]
    reader: Reader
    tokenise: Tokenise
    vocabulary: int
    """Token ids are below this."""
    ingredients: dict[str, Any]
    """All that decides which tokens come out, beside the content of the files: plain objects."""


def cache_folder(option: str | None) -> Path:
    """The folder that the option ``token_cache`` means: itself, ``$PANDA_CACHE``, or one in the home directory."""
    return Path(option or os.environ.get("PANDA_CACHE") or "~/.cache/panda").expanduser()


def tokenised(recipe: Recipe, cache: Path | None) -> TokenDataset:
    """The samples of ``recipe``, from ``cache`` if they are there; made and put there if not.

    One process makes them; others that want the same wait for it. Without a cache they are made in
    memory. Raises UserError where the data cannot be used.
    """
    if cache is None:
        block = SampleBlock()
        for part in tokenised_blocks(recipe.files, recipe.reader, recipe.tokenise):
            block.token_ids.extend(part.token_ids)
            block.supervised += part.supervised
            block.lengths.extend(part.lengths)
            block.report.add(part.report)
        return _usable(recipe, TokenDataset.of(block))
    before = _stamps(recipe)
    folder = cache / _key(recipe, cache)
    dataset = open_cache(folder, cache)
    if dataset is None:
        with _locked(cache, folder):
            # Whoever held the lock before may have made it.
            dataset = open_cache(folder, cache) or _make(recipe, cache, folder, before)
    return _usable(recipe, dataset)


def open_cache(folder: Path, cache: Path | None = None) -> TokenDataset | None:
    """The data set in ``folder``, mapped and not read; None where there is none or it is damaged.

    With ``cache``, contents are compared with the manifest, which costs a look at sizes and times
    unless those have changed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        progress = _Progress(folder).hashed
        for name, size in manifest["sizes"].items():
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{name} has not {size:,} bytes")
            if cache and content_hash(folder / name, cache / "hashes", progress) != manifest["hashes"][name]:
                raise ValueError(f"{name} has another content than was written")
        ids, mask, offsets = (_mapped(folder / f"{name}.bin", manifest["types"][name]) for name in ARRAYS)
        report = DataReport.from_json(manifest["report"])
        samples = hashlib.sha256(json.dumps(manifest["hashes"]).encode()).hexdigest()
        return TokenDataset(ids, mask, offsets, report, manifest["supervised_tokens"], samples, folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, UserError) as problem:
        print(f"token cache: {folder} is damaged and is made again: {problem}", file=sys.stderr, flush=True)
        return None


def _make(recipe: Recipe, cache: Path, folder: Path, before: list[list[int]]) -> TokenDataset:
    for left in cache.glob(f"{folder.name}.tmp-*"):  # by a process that was killed: this one has the lock
        shutil.rmtree(left, ignore_errors=True)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        blocks = tokenised_blocks(
            recipe.files, recipe.reader, recipe.tokenise, progress=_Progress(recipe.location).tokenised
        )
        manifest = _write(temporary, blocks, np.uint16 if recipe.vocabulary <= 1 << 16 else np.int32)
        for file, then, now in zip(recipe.files, before, _stamps(recipe), strict=True):
            if then != now:
                raise UserError(f"{file}: the file changed while it was read. Start again when it is complete.")
        manifest["ingredients"] = recipe.ingredients
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        temporary.rename(folder)
    except OSError as problem:
        what = "the disk is full" if problem.errno in NO_ROOM else problem.strerror
        raise UserError(
            f"token_cache: cannot write to {str(cache)!r}: {what}. Make room there (any folder in it can be deleted),"
            " or set `token_cache` to another folder."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for name, digest in manifest["hashes"].items():
        remember(folder / name, digest, cache / "hashes")
    made = open_cache(folder)
    assert made is not None
    return made


def _write(folder: Path, blocks: Iterable[SampleBlock], token_type: type) -> dict[str, Any]:
    """Write the arrays of ``blocks``; the manifest."""
    report = DataReport()
    supervised_tokens = end = 0
    with _Writer(folder, "token_ids") as ids, _Writer(folder, "supervised") as mask, _Writer(folder, "offsets") as ends:
        ends.write(np.zeros(1, dtype=np.int64))
        for block in blocks:
            report.add(block.report)
            supervised = np.frombuffer(block.supervised, dtype=np.uint8)
            supervised_tokens += int(np.count_nonzero(supervised))
            ids.write(np.array(block.token_ids).astype(token_type))
            mask.write(supervised)
            offsets = end + np.cumsum(np.array(block.lengths, dtype=np.int64))
            ends.write(offsets)
            end = int(offsets[-1]) if len(offsets) else end
    writers = (ids, mask, ends)
    return {
        "sizes": {f"{writer.name}.bin": writer.size for writer in writers},
        "hashes": {f"{writer.name}.bin": writer.hash.hexdigest() for writer in writers},
        "types": {"token_ids": np.dtype(token_type).name, "supervised": "bool", "offsets": "int64"},
        "supervised_tokens": supervised_tokens,
        "report": report.as_json(),
    }


class _Writer:
    """A file of one array, hashed as it is written, on disk when closed."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.size = 0
        self.hash = hashlib.sha256()
        self.file: BinaryIO = (folder / f"{name}.bin").open("wb")

    def write(self, array: np.ndarray) -> None:
        data = array.tobytes()
        self.file.write(data)
        self.hash.update(data)
        self.size += len(data)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())


def _mapped(file: Path, type_name: str) -> np.ndarray:
    if file.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype=type_name)
    # A plain array over the map: np.memmap's own class makes each slice ten times as slow.
    return np.asarray(np.memmap(file, dtype=type_name, mode="r"))


def _key(recipe: Recipe, cache: Path) -> str:
    """The address of the samples. Names of folders do not matter, order and content of files do."""
    progress = _Progress(recipe.location).hashed
    files = [content_hash(file, cache / "hashes", progress) for file in recipe.files]
    described = json.dumps(
        {"version": VERSION, "files": files, "ingredients": recipe.ingredients}, sort_keys=True, ensure_ascii=False
    )
    return hashlib.sha256(described.encode(errors="surrogatepass")).hexdigest()[:32]


def _stamps(recipe: Recipe) -> list[list[int]]:
    try:
        return [stamp(file.stat()) for file in recipe.files]
    except OSError as problem:
        raise UserError(f"{problem.filename}: cannot be read: {problem.strerror}") from None


def _usable(recipe: Recipe, dataset: TokenDataset) -> TokenDataset:
    if len(dataset) == 0:
        reasons = "".join(f"\n  {line}" for line in dataset.report.lines())
        raise UserError(f"{recipe.option}: {recipe.location!r} has no row that can be trained on.{reasons}")
    return dataset


@contextmanager
def _locked(cache: Path, folder: Path) -> Iterator[None]:
    """Be the one process that makes ``folder``. The system frees the lock of one that dies, however it does."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        file = folder.with_name(f"{folder.name}.lock").open("a+")
    except OSError as problem:
        raise UserError(
            f"token_cache: cannot make {str(cache)!r}: {problem.strerror}. Set `token_cache` to a folder that can be"
            " written to."
        ) from None
    with file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    file.seek(0)
                    who = file.read().strip() or "another process"
                    print(f"waiting for {who}, which tokenises the same data (rank {_rank()})", flush=True)
                    told = True
                time.sleep(POLL_SECONDS)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} (rank {_rank()})")
        file.flush()
        yield


def _rank() -> str:
    return os.environ.get("RANK", "0")


class _Progress:
    """How far a slow part of a start is, a line every few seconds: in a log as in a terminal."""

    SECONDS = 5.0

    def __init__(self, location: object) -> None:
        self.location = location
        self.started = self.last = time.monotonic()
        self.bytes = self.tokens = self.rows = 0

    def hashed(self, count: int) -> None:
        self.bytes += count
        self._say(f"reading {self.location} to know its content: {self.bytes / 1e9:,.1f} GB")

    def tokenised(self, block: SampleBlock) -> None:
        self.tokens += len(block.token_ids)
        self.rows += block.report.rows
        rate = self.tokens / max(1e-9, time.monotonic() - self.started)
        self._say(f"tokenising {self.location}: {self.rows:,} rows, {self.tokens:,} tokens, {rate:,.0f} tokens/s")

    def _say(self, line: str) -> None:
        if time.monotonic() - self.last >= self.SECONDS:
            self.last = time.monotonic()
            print(line, flush=True)
