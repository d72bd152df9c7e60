"""Which files hold the weights of a folder: one, several that an index lists, or all that match. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from panda.registry import UserError
from panda.weights.git_lfs import pointer_problem
from panda.weights.json_object import read_json_object


@dataclass(frozen=True)
class FileNames:
    """How a format names its files of weights."""

    pattern: str
    """Matches all of them."""
    single: str = ""
    """What transformers calls the file where there is only one."""
    index: str = ""
    """What transformers calls the index where there are several."""


SAFETENSORS = FileNames("*.safetensors", "model.safetensors", "model.safetensors.index.json")
PICKLES = FileNames("*.bin", "pytorch_model.bin", "pytorch_model.bin.index.json")

ADAPTER_WEIGHTS = "adapter_model*"
"""Matches the names of files in which peft keeps adapters."""

ADAPTER_FILES = FileNames("adapter_model*.safetensors")
"""Those among them that are read."""


def index_of(folder: Path, names: FileNames) -> dict[str, str]:
    """The name of each tensor, and of the file that holds it, by the index of ``folder``; empty without an index.

    Raises UserError where the index cannot be read.
    """
    file = folder / names.index
    if not names.index or not file.exists():
        return {}
    try:
        return dict(read_json_object(file)["weight_map"])
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{file}: not an index of weights: {problem!r}.") from None


def shard_names(folder: Path, names: FileNames, present: Collection[str]) -> list[str]:
    """Sorted names of the files with the weights of ``folder``: those in its index, or those of ``present`` that match.

    Files of other names beside an index, or beside a single file, are duplicates for other programs, and adapters are
    no weights of a model. Raises UserError where there are an index and a single file that it does not list, or only
    some of several files.
    """
    if indexed := sorted(set(index_of(folder, names).values())):
        if names.single in present and names.single not in indexed:
            raise UserError(
                f"{folder}: it has two sets of weights: {names.single}, and the files that {names.index} lists"
                f" ({indexed[0]}, ...). Move one of them away."
            )
        return indexed
    if names.single in present:
        return [names.single]
    found = sorted(name for name in present if fnmatch(name, names.pattern))
    if names is not ADAPTER_FILES:
        found = [name for name in found if not fnmatch(name, ADAPTER_WEIGHTS)]
    _refuse_incomplete(folder, found)
    return found


def _refuse_incomplete(folder: Path, found: list[str]) -> None:
    for name in found:
        if numbered := re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\..*)", name):
            begin, number, count, end = numbered.groups()
            whole = {f"{begin}{n:0{len(number)}}-of-{count}{end}" for n in range(1, int(count) + 1)}
            if lacking := sorted(whole.difference(found)):
                raise UserError(f"{folder}: files of weights are missing: {', '.join(lacking)}. Fetch them again.")


def shards(folder: Path, names: FileNames) -> list[Path]:
    """The files of weights in ``folder``. Raises UserError where files that its index lists are missing."""
    present = {file.name for file in folder.iterdir() if file.is_file()}
    wanted = shard_names(folder, names, present)
    if missing := [name for name in wanted if name not in present]:
        raise UserError(
            f"{folder}: {len(missing)} of {len(wanted)} files of weights are missing, which {names.index} lists:"
            f" {', '.join(missing)}. Fetch them again."
        )
    return [folder / name for name in wanted]


def damaged(file: Path, problem: str, what: str = "safetensors") -> UserError:
    """The error for a ``file`` that is not a complete file of ``what``, with what to do about it."""
    if pointer := pointer_problem(file):
        return UserError(f"{file}: {pointer}")
    return UserError(
        f"{file}: damaged, or not {what}: {problem}. It has {file.stat().st_size:,} bytes; was the copy or the"
        " download cut off? Fetch it again."
    )
