"""The layers that `lora_target_modules` names: by names, patterns, or all linear ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from panda.models.adapters.experts import ends_of_experts
from panda.models.adapters.experts import expert_parameters
from panda.models.adapters.linear_layers import adaptable_names
from panda.models.adapters.linear_layers import has_linear_routers
from panda.models.adapters.linear_layers import linear_names
from panda.models.adapters.linear_layers import listed_names
from panda.registry import UserError

ALL_LINEAR = "all-linear"
"""All linear layers except the output head, as peft has it; also the default."""


def chosen_targets(model: torch.nn.Module, written: Sequence[str]) -> tuple[list[str] | str, list[str]]:
    """What to give peft for ``written``, the items of the option: names of layers or ``ALL_LINEAR``, and of experts.

    An item may hold several, with commas between them. Each is the end of the names of layers (``q_proj``) or of
    parameters of experts (``experts.down_proj``), a regular expression for names or for their ends, or a pattern of the
    shell. Raises UserError for one that matches none.
    """
    items = [item for text in written for item in _items(text)]
    if not items:
        return ALL_LINEAR, []
    found_by = {item: _named(item, list(expert_parameters(model))) for item in items}
    experts = list(dict.fromkeys(name for found in found_by.values() for name in found))
    if ALL_LINEAR in items:
        if any(item != ALL_LINEAR and not found for item, found in found_by.items()):
            raise UserError(
                f"lora_target_modules: {ALL_LINEAR} means all layers but the head: leave the other layers out."
            )
        return ALL_LINEAR, experts
    known = ", ".join([listed_names(model), *ends_of_experts(model)])
    adaptable = adaptable_names(model)
    others = (name for name, module in model.named_modules() if not isinstance(module, torch.nn.Linear))
    layers = [*adaptable, *(name for name in others if not any(model.get_submodule(name).children()))]
    found: list[str] = []
    for item in items:
        if any(name == item or name.endswith(f".{item}") for name in layers):
            found.append(item)
        elif matching := _matching(item, adaptable):
            found += matching
        elif not found_by[item]:
            raise UserError(
                f"lora_target_modules: {type(model).__name__} has no {item!r}; it has {known}. A pattern"
                f" is for whole names such as {adaptable[0] if adaptable else 'layers.0.q_proj'}, or for their ends."
            )
    return list(dict.fromkeys(found)), experts


def linear_targets(model: Any) -> list[str] | str:
    """``ALL_LINEAR``, or the names of these layers where peft would take other modules of ``model`` for some."""
    if not has_linear_routers(model):
        return ALL_LINEAR
    return [name for name in linear_names(model) if model.get_submodule(name) is not model.get_output_embeddings()]


def _items(text: str) -> list[str]:
    """The items of ``text``, between commas that are not inside the brackets of a regular expression."""
    items, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            items.append("")
        else:
            items[-1] += character
    return [item.strip() for item in items if item.strip()]


def _named(item: str, names: Sequence[str]) -> list[str]:
    """``item`` where it is one of ``names`` or the end of some; else those that match it as a pattern."""
    return [item] if any(name == item or name.endswith(f".{item}") for name in names) else _matching(item, names)


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that match ``pattern`` as a regular expression, or else as a pattern of the shell."""
    try:
        expression = re.compile(rf"(?:.*\.)?(?:{pattern})")
    except re.error:  # `*.q_proj`
        found = []
    else:
        found = [name for name in names if expression.fullmatch(name)]
    return found or [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]
