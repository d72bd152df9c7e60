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
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
}
"""Keys of adapter_config.json, and the options of a run that say the same."""

_OF_MIXTURE = {"down_proj", "gate.weight", "gate_up_proj"}
_FUSED = r".*\.gate_up_proj"
"""What peft (0.21, 2026-11) writes for all layers of a mixture of experts: these parameters, and in `rank_pattern` and
`alpha_pattern` twice the values for the one that holds two layers of the published checkpoint."""

INSTEAD = (
    "To train new adapters on top of these, merge them into their base (`panda export RUN --merge` where a run of panda"
    " trained them, else with peft), and name the merged model with `ckpt_path`."
)
"""What to do with adapters that panda cannot go on training."""

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False, True),
    "init_lora_weights": (True, False, "gaussian"),
    **dict.fromkeys(
        (
            *("modules_to_save", "layers_to_transform", "layers_pattern"),
            *("layer_replication", "exclude_modules", "lora_bias", "alora_invocation_tokens"),
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
        raise UserError(
            f"{file}: panda has no option for {', '.join(unsupported)}, and cannot go on training them. {INSTEAD}"
        )
    values = {option: config[key] for key, option in OPTIONS.items() if config.get(key) is not None}
    targets = _targets(file, config)
    if targets is not None:
        values["lora_target_modules"] = targets
    if config.get("trainable_token_indices"):
        values["extend_vocab"] = True
    return {"use_lora": True, **values}


def _targets(file: Path, config: dict[str, Any]) -> tuple[str, ...] | None:
    """``lora_target_modules`` of a run whose adapters have ``config``, which is in ``file``; None if it states none.

    Raises UserError for ranks or scales that differ between layers, other than those that peft sets by itself.
    """
    layers, parameters = config.get("target_modules"), set(config.get("target_parameters") or ())
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not ranks and not alphas:
        if layers is None and not parameters:
            return None
        routers = {name for name in parameters if name == "gate.weight"}  # named as layers, see docs/models.md
        named = [layers] if isinstance(layers, str) else sorted(layers or ())
        return (*named, *sorted(parameters - routers), *(name.removesuffix(".weight") for name in routers))
    twice = ({_FUSED: 2 * config.get("r", 0)}, {_FUSED: 2 * config.get("lora_alpha", 0)})
    if (ranks, alphas) != twice or not parameters >= _OF_MIXTURE:
        raise UserError(
            f"{file}: panda has no option for rank_pattern: {ranks!r} and alpha_pattern: {alphas!r}, by which layers"
            f" differ in rank or scale, and cannot go on training them. {INSTEAD}"
        )
    return ("all-linear", *sorted(parameters - _OF_MIXTURE))
