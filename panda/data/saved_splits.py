"""Data sets that the library `datasets` has written: by `save_to_disk`, or prepared in its cache. It is not needed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from panda.registry import UserError

DICT, INFO, STATE = "dataset_dict.json", "dataset_info.json", "state.json"
DESCRIPTIONS = (DICT, INFO, STATE)
"""Files beside the data that describe it: no rows."""


def saved_splits(folder: Path) -> dict[str, list[Path]] | None:
    """The files of each split in ``folder``, in the order of their rows; None for a folder of another kind.

    Raises UserError where a file is missing.
    """
    if (folder / DICT).is_file():
        names = _content(folder / DICT).get("splits", [])
        return {str(name): _saved(folder / str(name)) for name in names}
    if is_saved(folder):
        return {str(_content(folder / STATE).get("_split") or "train"): _saved(folder)}
    if (folder / INFO).is_file():
        return _prepared(folder, _content(folder / INFO))
    return None


def is_saved(folder: Path) -> bool:
    """Whether ``folder`` holds one data set without splits."""
    return (folder / STATE).is_file() and (folder / INFO).is_file()


def _saved(folder: Path) -> list[Path]:
    listed = _content(folder / STATE).get("_data_files")
    if not isinstance(listed, list):
        raise UserError(f"{folder / STATE}: it names no files of data, as `save_to_disk` writes them.")
    return _present([folder / each["filename"] for each in listed], folder)


def _prepared(folder: Path, info: dict[str, Any]) -> dict[str, list[Path]] | None:
    """Files of the cache: `gsm8k-train.arrow`, or `gsm8k-train-00000-of-00002.arrow`. None where there are none."""
    found = {}
    name, splits = re.escape(str(info.get("dataset_name"))), info.get("splits")
    for split, about in splits.items() if isinstance(splits, dict) else ():
        pattern = re.compile(rf"{name}-{re.escape(split)}(-\d{{5}}-of-(\d{{5}}))?\.(arrow|parquet)")
        named = [(file, match) for file in sorted(folder.iterdir()) if (match := pattern.fullmatch(file.name))]
        if named:
            count = named[0][1][2]
            if count is not None and len(named) != int(count):
                raise UserError(f"{folder}: {len(named)} of {int(count)} files of the split {split} are there.")
            found[split] = [file for file, _ in named]
        elif about.get("num_examples"):
            return None
    return found or None


def _present(files: list[Path], folder: Path) -> list[Path]:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder}: {STATE} names {', '.join(missing[:5])}, which is not there. Copy the folder again.")
    return files


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(f"{file}: cannot be read: {problem}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: it is no object of JSON, as `datasets` writes it.")
    return content
