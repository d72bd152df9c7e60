"""Adapters as peft stores them, as a starting point: their base, and the options that they were trained with."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from panda.registry import UserError
from panda.weights.formats import ADAPTERS
from panda.weights.formats import format_among
from panda.weights.json_object import read_json_object
from panda.weights.shards import ADAPTER_WEIGHTS

OPTIONS = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
}
"""Keys of adapter_config.json, and the options of a run that say the same."""

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False, True),
    "init_lora_weights": (True, False, "gaussian"),
    **dict.fromkeys(
        (
            *("modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"),
            *("layer_replication", "exclude_modules", "target_parameters", "lora_bias", "alora_invocation_tokens"),
        ),
        (None, False, {}, []),
    ),
}
"""Keys that change what is trained in ways that panda has no option for, and the values that do not."""


def is_adapters(folder: Path, names: Collection[str]) -> bool:
    """Whether ``folder``, with files of these ``names``, holds adapters.

    Raises UserError where a model is beside them.
    """
    if ADAPTERS not in names or not any(fnmatch(name, ADAPTER_WEIGHTS) for name in names):
        return False
    if format_among(names) is not None:
        raise UserError(
            f"{folder}: it has two sets of weights: a model, and adapters ({ADAPTERS}). Move one of them to a folder of"
            " its own, and name the one that is meant."
        )
    return True


def base_of_adapters(folder: Path) -> str | None:
    """The location of the base that the adapters in ``folder`` name; None if they name none."""
    named = read_json_object(folder / ADAPTERS).get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def adapter_options(folder: Path) -> dict[str, Any]:
    """The options of a run that goes on training the adapters in ``folder``, as their configuration states them.

    Raises UserError for adapters that panda cannot train.
    """
    file = folder / ADAPTERS
    config = read_json_object(file)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: these adapters are of type {config.get('peft_type')!r}; panda trains LORA.")
    unsupported = [
        f"{key}: {config[key]!r}" for key, plain in _UNSUPPORTED.items() if config.get(key, plain[0]) not in plain
    ]
    if unsupported:
        raise UserError(f"{file}: panda has no option for {', '.join(unsupported)}, and cannot go on training them.")
    values = {option: config[key] for key, option in OPTIONS.items() if config.get(key) is not None}
    targets = values.get("lora_target_modules")
    if targets is not None:
        values["lora_target_modules"] = (targets,) if isinstance(targets, str) else tuple(sorted(targets))
    if config.get("trainable_token_indices"):
        values["extend_vocab"] = True
    return {"use_lora": True, **values}
