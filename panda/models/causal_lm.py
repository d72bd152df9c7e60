"""Causal language models of transformers, made from a config.json; shared by training and answering."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import Any

from panda.registry import UserError
from panda.registry.errors import in_brief

if TYPE_CHECKING:
    import torch

_MOST_LAYERS, _LARGEST = 10**4, 2**48
"""Of layers, and of any other number in a config.json."""
_NAMING_CODE = ("attn_implementation", "attn_implementation_internal", "experts_implementation")
"""Keys of a config.json with which transformers (5.23, 2026-11) can be asked for a kernel on the hub, in its code."""


def build_causal_lm(
    config: Mapping[str, Any], source: str, *, dtype: torch.dtype | None = None, use_cache: bool | None = None
) -> Any:
    """The model that transformers makes of ``config``, the content of a config.json.

    It has random weights, or none inside ``without_weights()``. ``dtype`` and ``use_cache`` (of keys and values)
    replace what ``config`` states; a type that neither states is float32. ``source`` is what errors call the
    checkpoint. Raises UserError where transformers makes no such model.
    """
    import torch
    from transformers import AutoConfig
    from transformers import AutoModelForCausalLM

    # As of 5.23 (2026-11), transformers writes into the dictionaries that it is given.
    values = copy.deepcopy(dict(config))
    refuse_code_of_hub(values, source)
    _refuse_senseless(values, source)
    model_type = values.pop("model_type", None)
    try:
        parsed = AutoConfig.for_model(model_type, **values)
        if use_cache is not None:
            parsed.use_cache = use_cache
        return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            parsed,
            dtype=dtype or parsed.dtype or torch.float32,
            trust_remote_code=False,  # by default it asks on stdin
        )
    except Exception as problem:  # transformers lets the exceptions of its parsers through
        own = " Its own code (auto_map) is not run." if "auto_map" in values else ""
        raise UserError(
            f"{source}: transformers makes no causal language model of its config.json, of model_type"
            f" {model_type!r}: {in_brief(problem)}.{own}"
        ) from problem


def _refuse_senseless(config: Mapping[str, Any], source: str) -> None:
    """Raise UserError where ``config`` states a size that no model has: a layer is made at a time, for hours."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _refuse_senseless(value, source)
        most = _MOST_LAYERS if key in ("num_hidden_layers", "num_layers", "n_layer", "n_layers") else _LARGEST
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > most:
            shown = str(value) if abs(value) < 10**20 else "a number of more than 20 digits"
            raise UserError(f"{source}: {key} of its config.json is {shown}, and no model has more than {most:,}.")


def refuse_code_of_hub(config: Mapping[str, Any], source: str) -> None:
    """Raise UserError where ``config`` names code on the hub, which transformers would fetch and run: ``OWNER/NAME``.

    ``source`` is what the error calls the checkpoint.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            refuse_code_of_hub(value, source)
        if key.lstrip("_") in _NAMING_CODE:
            texts = value.values() if isinstance(value, Mapping) else [value]
            if named := next((text for text in texts if isinstance(text, str) and "/" in text), None):
                raise UserError(
                    f"{source}: {key} of its config.json is {named!r}, code on the Hugging Face hub, which panda does"
                    " not run. Remove the key: panda chooses how attention is computed."
                )
