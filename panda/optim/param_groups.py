"""The parameter groups of a module: the one place that decides them."""

from __future__ import annotations

import re
from collections.abc import Collection
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch

from panda.optim.parameter_kinds import describe_parameters
from panda.registry import UserError
from panda.weights.layer_names import layer_of


def param_groups(
    module: torch.nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    decay_on: str = "all",
    multipliers: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """One group a layer, in the order of the module, and more if rate or decay differ within a layer.

    During a step, ZeRO-1 and 2 (DeepSpeed 0.19.8, 2026-11) make an fp32 copy of the gradients of one
    group at a time. With one group for the whole model, that copy is as large as the model: 25 GiB at
    7B, measured. Groups for rate and decay are enough once DeepSpeed makes no such copy.

    ``decay_on``: "all" parameters, or "matrices": no norms, biases or embeddings. ``multipliers``:
    factors of the learning rate, by pattern of names (``*`` is any text); the first that matches
    counts. Raises UserError for a pattern that matches nothing.
    """
    multipliers = multipliers or {}
    refuse_unmatched(multipliers, [name for name, _ in module.named_parameters()])
    groups: dict[tuple[str | None, bool, float], dict[str, Any]] = {}
    for parameter, described in describe_parameters(module).items():
        matching = [pattern for pattern in multipliers if fnmatchcase(described.name, pattern)]
        decayed = decay_on == "all" or (len(described.shape) > 1 and described.kind not in ("embedding", "bias"))
        factor = multipliers[matching[0]] if matching else 1.0
        group = groups.setdefault(
            (layer_of(described.name), decayed, factor),
            {"params": [], "lr": learning_rate * factor, "weight_decay": weight_decay if decayed else 0.0},
        )
        group["params"].append(parameter)
    return list(groups.values())


def refuse_unmatched(multipliers: Collection[str], names: Collection[str]) -> None:
    """Raise UserError where a pattern of ``multipliers`` matches none of ``names``, which are of all parameters."""
    unused = [pattern for pattern in multipliers if not any(fnmatchcase(name, pattern) for name in names)]
    if unused:
        shown = ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
        raise UserError(
            f"lr_multipliers: {', '.join(sorted(unused))} matches no parameter. The parameters are: {shown}."
        )
