"""Data sets tokenised once: memory-mapped files, addressed by the content that they were made of.

    CACHE/<key>/token_ids.bin supervised.bin offsets.bin sample_hashes.bin places.bin manifest.json
                              (of text; in general a file for each field, and offsets for each with its own lengths)
    CACHE/<key>.lock          held by the one process that makes the folder, while the others wait
    CACHE/hashes/             hashes of file contents, remembered by size and time

The key is a hash of everything that decides which tokens come out: the bytes of the data, the tokenizer,
and the task with its options. A folder is complete or absent, and can be deleted at any time between runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextlib import ExitStack
from dataclasses import asdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from typing import BinaryIO

import numpy as np

from panda.data.content_hash import content_hash
from panda.data.content_hash import remember
from panda.data.content_hash import stamp
from panda.data.fields import TEXT
from panda.data.fields import Field
from panda.data.packed_files import unpacked_name
from panda.data.places import renumbered
from panda.data.recipe import Recipe
from panda.data.report import DataReport
from panda.data.token_dataset import SampleBlock
from panda.data.token_dataset import TokenDataset
from panda.data.token_dataset import supervised_in
from panda.data.tokenising import tokenised_blocks
from panda.files.activity import Activity
from panda.files.activity import activity
from panda.files.disk_full import disk_full
from panda.files.locks import held
from panda.files.own import refuse_strangers
from panda.files.whole import whole
from panda.registry import UserError
from panda.registry.location import expanded
from panda.registry.location import problem_of_path

VERSION = 5
"""Raised by whoever changes the layout of the files, or which tokens a reader or a task of panda's makes of data."""

MANIFEST = "manifest.json"
HASHES = "sample_hashes"
PLACES = "places"
"""The arrays that are about the samples: hashes of their tokens, and the rows that they are made of. The others are the
samples."""


def cache_folder(option: str | None) -> Path:
    """The folder that the option ``token_cache`` means: its value, ``$PANDA_CACHE``, or one in the home directory."""
    named = option or os.environ.get("PANDA_CACHE") or "~/.cache/panda"
    try:
        folder = expanded(named)
    except UserError as problem:
        raise UserError(
            f"token_cache: {problem} `token_cache` or PANDA_CACHE names a folder for tokenised data."
        ) from None
    if why := problem_of_path(named):
        raise UserError(f"token_cache: {named[:200]!r} is no path. {why}")
    return folder


@dataclass(frozen=True)
class TokenCache:
    """A folder that keeps tokenised data for the next run."""

    folder: Path

    def samples(self, recipe: Recipe) -> TokenDataset:
        """The samples of ``recipe``; what the cache lacks is tokenised and kept.

        One process does that; others that want the same wait for it. Raises UserError where the data cannot be used.
        """
        before = _stamps(recipe)
        refuse_strangers(self._hashes, self.folder, "token_cache")
        hashes = self._content_hashes(recipe)
        folder = self.folder / self._key(recipe, hashes)
        refuse_strangers(folder, self.folder, "token_cache")
        dataset = open_cache(folder, self.folder)
        if dataset is None:
            with ExitStack() as stack:
                alone = self._hold(folder, stack)
                # Whoever held the lock before may have made it.
                dataset = open_cache(folder, self.folder) or self._make(recipe, folder, before, alone=alone)
        return recipe.usable(dataset, hashes)

    @property
    def _hashes(self) -> Path:
        return self.folder / "hashes"

    def _content_hashes(self, recipe: Recipe) -> list[str]:
        try:
            size = sum(file.stat().st_size for file in recipe.files)
            with _reading(recipe.location, size) as shown:
                return [content_hash(file, self._hashes, shown.advance) for file in recipe.files]
        except FileNotFoundError as problem:
            raise UserError(
                f"{recipe.location}: {problem.filename} has been removed since the files were listed. Start again when"
                " nothing changes the data."
            ) from None

    def _key(self, recipe: Recipe, hashes: Sequence[str]) -> str:
        """The address of the samples. Names do not matter but for their endings; order and content of files do."""
        files = [[digest, _ending(file)] for file, digest in zip(recipe.files, hashes, strict=True)]
        described = json.dumps(
            {"version": VERSION, "files": files, "ingredients": recipe.ingredients}, sort_keys=True, ensure_ascii=False
        )
        return hashlib.sha256(described.encode(errors="surrogatepass")).hexdigest()[:32]

    def _hold(self, folder: Path, stack: ExitStack) -> bool:
        """Hold the lock of ``folder`` for as long as ``stack`` is open. Whether it is held: there may be no locks."""
        lock = held(
            folder.with_name(f"{folder.name}.lock"),
            waiting=_say_who_tokenises,
            unlocked="processes that start together all tokenise the data, and keep one result.",
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return stack.enter_context(lock)
        except OSError as problem:
            raise UserError(
                f"token_cache: cannot make {str(self.folder)!r}: {problem.strerror}. Set `token_cache` to a folder that"
                " can be written to."
            ) from None

    def _make(self, recipe: Recipe, folder: Path, before: list[list[int]], *, alone: bool) -> TokenDataset:
        """Tokenise ``recipe`` into ``folder``. ``before``: stamps of the data files when their content was hashed."""
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        try:
            tokenising = activity(f"tokenising {recipe.location}", unit="rows", any_rank=True)
            with whole(folder, alone=alone) as new, tokenising as shown:
                new.mkdir()
                progress = partial(_count, shown, [0])
                blocks = tokenised_blocks(
                    recipe.files, recipe.reader, recipe.tokenise, fields=recipe.fields, progress=progress
                )
                manifest = _write(new, blocks, recipe)
                for file, then, now in zip(recipe.files, before, _stamps(recipe), strict=True):
                    if then != now:
                        raise UserError(f"{file}: the file changed while it was read. Start again when it is complete.")
                manifest["ingredients"] = recipe.ingredients
                (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        except OSError as problem:
            if not alone and (made := open_cache(folder)):
                return made  # by another process, in the meantime
            why = disk_full(problem) or problem.strerror or ""
            room = "Make room there (any folder in it can be deleted), or set" if "full" in why else "Set"
            raise UserError(
                f"token_cache: cannot write to {str(self.folder)!r}: {why}. {room} `token_cache` to another folder."
            ) from None
        for name, digest in manifest["hashes"].items():
            remember(folder / name, digest, self._hashes)
        made = open_cache(folder)
        assert made is not None
        return made


def open_cache(folder: Path, cache: Path | None = None) -> TokenDataset | None:
    """The data set in ``folder``, mapped and not read; None where there is none or it is damaged.

    With ``cache``, the folder of the cache, contents are compared with the manifest: by size and time,
    and by reading the files where those have changed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        sizes = manifest["sizes"]
        with _reading(folder, sum(sizes.values())) as shown:
            for name, size in sizes.items():
                if (folder / name).stat().st_size != size:
                    raise ValueError(f"{name} does not have {size:,} bytes")
                if cache and content_hash(folder / name, cache / "hashes", shown.advance) != manifest["hashes"][name]:
                    raise ValueError(f"{name} does not have the content that was written")
        fields = _stored(manifest)
        names = dict.fromkeys([*(each.name for each in fields), *(offsets_of(each, fields) for each in fields)])
        arrays = {name: _mapped(folder / f"{name}.bin", manifest["types"][name]) for name in [*names, HASHES, PLACES]}
        contents = {f"{name}.bin": manifest["hashes"][f"{name}.bin"] for name in names}
        return TokenDataset(
            fields,
            {each.name: arrays[each.name] for each in fields},
            {each.name: arrays[offsets_of(each, fields)] for each in fields},
            arrays[HASHES],
            DataReport.from_json(manifest["report"]),
            hashlib.sha256(json.dumps(contents).encode()).hexdigest(),
            manifest["supervised_tokens"],
            folder,
            arrays[PLACES],
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError) as problem:
        print(f"token cache: {folder} is damaged and is made again: {problem}", file=sys.stderr, flush=True)
        return None


def _stored(manifest: dict[str, Any]) -> tuple[Field, ...]:
    """The fields in a folder of the cache; of text where its manifest, of an older version, names none."""
    if "fields" not in manifest:
        return tuple(each for each in TEXT if not each.optional)
    return tuple(Field(**each) for each in manifest["fields"])


def offsets_of(field: Field, fields: Sequence[Field]) -> str:
    """The name of the array with the offsets of ``field``, one of ``fields``."""
    leader = field.along or field.name
    return "offsets" if leader == fields[0].name else f"{leader}.offsets"


def _ending(file: Path) -> str:
    """The end of the name of ``file`` by which a reader knows how to read it."""
    name = file.name.lower()
    unpacked = unpacked_name(file)
    return Path(unpacked).suffix + name[len(unpacked) :]


def _write(folder: Path, blocks: Iterable[SampleBlock], recipe: Recipe) -> dict[str, Any]:
    """Write the arrays of ``blocks`` to files in ``folder``, and return what the manifest says of them."""
    report = DataReport()
    supervised_tokens = 0
    fields = recipe.fields
    with ExitStack() as stack:
        writers: dict[str, _Writer] = {}

        def writer(name: str, type_name: str) -> _Writer:
            writers[name] = stack.enter_context(_Writer(folder, name, type_name))
            return writers[name]

        for each in fields:
            if not each.optional:
                writer(each.name, each.type_of(recipe.vocabulary))
        for each in fields:
            if each.along is None:
                writer(offsets_of(each, fields), "int64").write(np.zeros(1, dtype=np.int64))
        hashes, places = writer(HASHES, "uint64"), writer(PLACES, "int64")
        numbers = {file: number for number, file in enumerate(recipe.files)}
        ends = {each.name: 0 for each in fields if each.along is None}
        for block in blocks:
            report.add(block.report)
            supervised_tokens += supervised_in(fields, block.arrays)
            for each in fields:
                start, size = ends[each.along or each.name], sum(block.sizes[each.along or each.name])
                if each.name not in writers and each.name in block.arrays:
                    writer(each.name, each.type_of(recipe.vocabulary)).write(np.ones(start))
                if each.name in writers:
                    writers[each.name].write(np.array(block.arrays.get(each.name, np.ones(size))))
            for name, end in ends.items():
                offsets = end + np.cumsum(np.array(block.sizes[name], dtype=np.int64))
                writers[offsets_of(Field(name, ""), fields)].write(offsets)
                ends[name] = int(offsets[-1]) if len(offsets) else end
            hashes.write(np.array(block.sample_hashes, dtype=np.uint64))
            places.write(renumbered(block.places, [numbers.get(file) for file in block.files]))
    stored = [asdict(each) for each in fields if each.name in writers]
    return {
        "sizes": {f"{name}.bin": each.size for name, each in writers.items()},
        "hashes": {f"{name}.bin": each.hash.hexdigest() for name, each in writers.items()},
        "types": {name: each.type for name, each in writers.items()},
        "fields": stored,
        "supervised_tokens": supervised_tokens,
        "report": report.as_json(),
    }


class _Writer:
    """A file of one array, hashed as it is written."""

    def __init__(self, folder: Path, name: str, type_name: str) -> None:
        self.type = type_name
        self.size = 0
        self.hash = hashlib.sha256()
        self.file: BinaryIO = (folder / f"{name}.bin").open("wb")

    def write(self, array: np.ndarray) -> None:
        data = array.astype(self.type, copy=False).tobytes()
        self.file.write(data)
        self.hash.update(data)
        self.size += len(data)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()


def _mapped(file: Path, type_name: str) -> np.ndarray:
    if file.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype=type_name)
    # A plain array over the map: np.memmap's own class makes each slice ten times as slow.
    return np.asarray(np.memmap(file, dtype=type_name, mode="r"))


def _stamps(recipe: Recipe) -> list[list[int]]:
    try:
        return [stamp(file.stat()) for file in recipe.files]
    except OSError as problem:
        raise UserError(f"{problem.filename}: cannot be read: {problem.strerror}") from None


def _say_who_tokenises(holder: str) -> None:
    print(f"rank {os.environ.get('RANK', '0')} is waiting: the same data is being tokenised by {holder}", flush=True)


def _reading(location: object, size: int) -> AbstractContextManager[Activity]:
    return activity(f"reading {location} to know its content", size, unit="B", any_rank=True)


def _count(shown: Activity, tokens: list[int], block: SampleBlock) -> None:
    """Show that ``block`` is tokenised, besides the ``tokens`` that are."""
    tokens[0] += sum(len(block.arrays[each.name]) for each in block.fields if each.kind == "tokens")
    shown.advance(block.report.rows)
    shown.facts = [f"{tokens[0]:,} tokens", f"{tokens[0] / max(1e-9, shown.seconds):,.0f} tokens/s"]
