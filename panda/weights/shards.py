"""Which files hold the weights of a folder: one, several that an index lists, or all of a kind. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from panda.registry import UserError


@dataclass(frozen=True)
class Kind:
    """Names of files of weights: a pattern of all, and what transformers calls the only one, and the index of many."""

    pattern: str
    single: str = ""
    index: str = ""


SAFETENSORS = Kind("*.safetensors", "model.safetensors", "model.safetensors.index.json")
PICKLES = Kind("*.bin", "pytorch_model.bin", "pytorch_model.bin.index.json")


_POINTER = b"version https://git-lfs"


def index_of(folder: Path, kind: Kind) -> dict[str, str]:
    """By name of each tensor the file that the index of ``folder`` has it in; empty where there is no index.

    Raises UserError where that cannot be read.
    """
    file = folder / kind.index
    if not kind.index or not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{file}: not an index of weights: {problem!r}.") from None


def shard_names(folder: Path, kind: Kind, there: Collection[str]) -> list[str]:
    """Names of the files of weights of ``folder``, sorted: those of its index, or of ``there`` those that are such.

    Files of weights beside these are the same again, for other programs.
    """
    if indexed := index_of(folder, kind):
        return sorted(set(indexed.values()))
    return [kind.single] if kind.single in there else sorted(name for name in there if fnmatch(name, kind.pattern))


def shards(folder: Path, kind: Kind) -> list[Path]:
    """The files of weights in ``folder``. Raises UserError where some that its index lists are not there."""
    there = {file.name for file in folder.iterdir() if file.is_file()}
    names = shard_names(folder, kind, there)
    if missing := [name for name in names if name not in there]:
        raise UserError(
            f"{folder}: {len(missing)} of {len(names)} files of weights are missing, which {kind.index} lists:"
            f" {', '.join(missing)}. Fetch them again."
        )
    return [folder / name for name in names]


def damaged(file: Path, problem: str, what: str = "safetensors") -> UserError:
    """The error that ``file`` is no whole file of ``what``, with what to do."""
    with file.open("rb") as stream:
        is_pointer = stream.read(len(_POINTER)) == _POINTER
    if is_pointer:
        return UserError(
            f"{file}: what git leaves in place of a large file where git-lfs is not set up. `git lfs install`, and `git"
            " lfs pull` in that folder, fetch it."
        )
    return UserError(
        f"{file}: damaged, or not {what}: {problem}. It has {file.stat().st_size:,} bytes; was the copy or the"
        " download cut off? Fetch it again."
    )
