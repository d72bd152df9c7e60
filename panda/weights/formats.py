"""The formats in which a folder keeps a model: which one it is by the names of its files, and how each is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from panda.registry import UserError
from panda.weights.meta_format import PARAMS
from panda.weights.meta_format import SHARDS
from panda.weights.meta_format import meta_config
from panda.weights.meta_format import meta_weights
from panda.weights.shards import PICKLES
from panda.weights.shards import SAFETENSORS
from panda.weights.shards import Kind

if TYPE_CHECKING:
    from panda.weights.stored_tensor import Weights

CONFIG = "config.json"
ADAPTERS = "adapter_config.json"
"""What a folder of peft's has in its place."""


@dataclass(frozen=True)
class Format:
    """A way to keep a model in a folder."""

    name: str
    files: str
    """Pattern of the names of its files of weights, and of their index."""
    kind: Kind
    """The names of its files of weights."""
    described_in: str
    """The file with its configuration."""
    config: Callable[[Path], dict[str, Any]]
    weights: Callable[[Path], Weights]
    is_pickle: bool


def format_among(names: Collection[str]) -> Format | None:
    """The format of a folder with files of these ``names``, whatever else it lacks; None where none are of weights."""
    return next((format_ for format_ in FORMATS if any(fnmatch(name, format_.files) for name in names)), None)


def format_of(folder: Path, names: Collection[str], option: str) -> Format:
    """The format of what is in ``folder``, or can be fetched to it: files of these ``names``.

    Raises UserError, which names ``option``, where that is no checkpoint of a model.
    """
    format_ = format_among(names)
    if format_ is None:
        if (folder / CONFIG).exists():
            raise UserError(f"{option}: {folder} has no weights: none of {', '.join(f.files for f in FORMATS)}.")
        format_ = FORMATS[0]
    needed = format_.described_in
    if not (folder / needed).exists():
        seen = f"it has {', '.join(sorted(names)[:6])}{', ...' if len(names) > 6 else ''}" if names else "it is empty"
        raise UserError(
            f"{option}: {folder} has no {needed}, so it is no checkpoint of a model; {seen}.{_instead(folder)}"
        )
    return format_


def _instead(folder: Path) -> str:
    """What to name in place of ``folder``, where a run wrote it."""
    export = folder / "export"
    if (folder / ADAPTERS).exists() or (export / ADAPTERS).exists():
        run = folder if (export / ADAPTERS).exists() else "RUN"
        return (
            f" It holds adapters, which are no model without their base: `panda export {run} --merge` writes the two"
            " as one, to RUN/merged; name that."
        )
    if (export / CONFIG).exists():
        return f" It is a run; name its export, {export}."
    if (folder / "provenance.json").exists():
        return f" It is a run without an export: `panda export {folder}` writes one, to RUN/export; name that."
    return ""


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise UserError(f"{file}: not valid JSON: {problem}.") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{file}: it has no 'model_type', so it is not the configuration of a transformers model.")
    return config


def _safetensors(folder: Path) -> Weights:
    from panda.weights.files import safetensors_weights

    return safetensors_weights(folder)


def _pickles(folder: Path) -> Weights:
    from panda.weights.files import pickled_weights

    return pickled_weights(folder)


META = Format("Meta's original format", SHARDS, Kind(SHARDS), PARAMS, meta_config, meta_weights, is_pickle=True)
FORMATS = (
    Format("safetensors", "*.safetensors*", SAFETENSORS, CONFIG, _read_config, _safetensors, is_pickle=False),
    Format("pickles", "*.bin*", PICKLES, CONFIG, _read_config, _pickles, is_pickle=True),
    META,
)
"""In the order in which a folder that has several is taken."""
