"""The formats in which a folder can hold a model, recognised by the names of its files, and how each is read."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from panda.registry import UserError
from panda.weights.json_object import read_json_object
from panda.weights.meta_format import PARAMS
from panda.weights.meta_format import SHARDS
from panda.weights.meta_format import meta_config
from panda.weights.meta_format import meta_weights
from panda.weights.shards import ADAPTER_WEIGHTS
from panda.weights.shards import PICKLES
from panda.weights.shards import SAFETENSORS
from panda.weights.shards import FileNames

if TYPE_CHECKING:
    from panda.weights.stored_tensor import Weights

CONFIG = "config.json"
ADAPTERS = "adapter_config.json"
"""What a folder written by peft has in place of CONFIG."""


@dataclass(frozen=True)
class Format:
    """One way to hold a model in a folder."""

    name: str
    files: str
    """Matches the names of its files of weights, and of their index."""
    file_names: FileNames
    """The names of its files of weights."""
    described_in: str
    """The file with its configuration."""
    config: Callable[[Path], dict[str, Any]]
    """The configuration in a folder, as config.json has it."""
    weights: Callable[[Path], Weights]
    """The tensors in a folder."""
    is_pickle: bool
    """Whether reading its weights means loading pickles."""


def format_among(names: Collection[str]) -> Format | None:
    """The format of a folder with files of these ``names``, whatever else it lacks; None if none are weights."""
    of_models = [name for name in names if not fnmatch(name, ADAPTER_WEIGHTS)]
    return next((format_ for format_ in FORMATS if any(fnmatch(name, format_.files) for name in of_models)), None)


def left_aside(names: Collection[str], read: Format) -> list[str]:
    """Those of ``names`` that are weights in another format than ``read``, the one that is read."""
    others = (format_ for format_ in FORMATS if format_ is not read)
    return sorted(
        name
        for format_ in others
        for name in names
        if fnmatch(name, format_.files) and not fnmatch(name, ADAPTER_WEIGHTS)
    )


def format_of(folder: Path, names: Collection[str], option: str) -> Format:
    """The format of ``folder``, which holds files of these ``names``, or to which they can be fetched.

    Raises UserError, which names ``option``, where it is not a checkpoint of a model.
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
            f"{option}: {folder} has no {needed}, so it is not a checkpoint of a model; {seen}.{_instead(folder)}"
        )
    return format_


def _instead(folder: Path) -> str:
    """Advice for a ``folder`` that a run wrote: the folder to name in its place. Empty for any other."""
    if (folder / ADAPTERS).exists():
        return (
            " It holds adapters, which are not a model without their base: `panda export RUN --merge` writes the sum of"
            " both to RUN/merged; name that."
        )
    if (folder / "manifest.json").exists():
        return f" It is a checkpoint of a run: `panda export {folder} --output NAME` writes its model; name that."
    if (folder / "provenance.json").exists():
        return f" It is a run without an export: `panda export {folder}` writes one, to RUN/export; name that."
    return ""


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json_object(folder / CONFIG)
    if "model_type" not in config and "panda_model" not in config:
        raise UserError(
            f"{folder / CONFIG}: it has no 'model_type', so it is not the configuration of a transformers model."
        )
    if config.get("quantization_config", {}) is None:  # as some programs write that there is none
        del config["quantization_config"]
    return config


def _safetensors(folder: Path) -> Weights:
    from panda.weights.files import safetensors_weights

    return safetensors_weights(folder)


def _pickles(folder: Path) -> Weights:
    from panda.weights.files import pickled_weights

    return pickled_weights(folder)


META = Format("Meta's original format", SHARDS, FileNames(SHARDS), PARAMS, meta_config, meta_weights, is_pickle=True)
FORMATS = (
    Format("safetensors", "*.safetensors*", SAFETENSORS, CONFIG, _read_config, _safetensors, is_pickle=False),
    Format("pickles", "*.bin*", PICKLES, CONFIG, _read_config, _pickles, is_pickle=True),
    META,
)
"""In order of preference, for a folder that has several."""
