"""The config.json of an export, which transformers 4.57 reads as transformers 5 does; and which model one describes.

transformers 5 renamed keys, and its classes write only the new ones: version 4.57 reads such a file without a word,
and computes with its defaults. So a file states what both of them read. The keys that were renamed were found by
comparing what 4.57.6 and 5.23.0 write for all their causal language models (2026-11). Imports no torch.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from panda.weights.json_object import special_float

_LEFT_OUT = ("auto_map", "_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset")
"""Keys that name files which an export does not have, or that are about the machine which wrote them."""

_NEVER_FROM_BASE = ("torch_dtype", "dtype", "quantization_config", "transformers_version")
"""Keys that describe the files of the base, of which an export has none."""

_NOT_OF_THE_MODEL = (*_LEFT_OUT, *_NEVER_FROM_BASE, "vocab_size", "initializer_range", "use_cache")
"""Keys that do not change what a model computes with its weights: a run may add rows to the vocabulary."""

_NAMES_OF_ROPE = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "modernbert-decoder": {"rope_theta": "global_rope_theta", "rope_local_base_freq": "local_rope_theta"},
}
"""By model_type: what its class in 4.57 calls the parameters of RoPE, where that is not what others do."""

_STRICT_SCALING = ("olmo", "olmo2", "phi3")
"""Types whose class in 4.57 wants ``type`` instead of ``rope_type`` in ``rope_scaling``, and no key besides its own."""


def model_config(config: Any, base: Mapping[str, Any] | None) -> dict[str, Any]:
    """The content of config.json for ``config``, a configuration of transformers.

    It says what ``base``, the config.json that the model began from, says, in the same words, also where
    transformers drops or rewrites them; except what differs in the model, which is stated as ``config`` has it.
    """
    values = _written(config)
    if base is not None and base.get("model_type") == values.get("model_type"):
        given = copy.deepcopy({key: value for key, value in base.items() if key not in _NEVER_FROM_BASE})
        # As this version of transformers reads the base: what differs from that was changed by the run.
        read = _written(
            type(config)(**{key: value for key, value in copy.deepcopy(given).items() if key != "model_type"})
        )
        of_rope = () if _rope(values) == _rope(read) else _keys_of_rope(values)
        for key, value in given.items():
            if key in of_rope or (key in values and values[key] != read.get(key)):
                continue
            values[key] = value
    return for_all_readers(dict(sorted(values.items())))


def architecture_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """What ``values``, the content of a config.json, say of what the model computes with its weights, by dotted name.

    As transformers reads them, so that a config.json which another version wrote says the same; as they are where
    transformers knows no such model. Without names, types and versions of files, numbers of tokens, and other things
    that transformers has for models of all architectures.
    """
    from transformers import PretrainedConfig

    try:
        values = json.loads(_parsed(values).to_json_string(use_diff=False), object_hook=special_float)
    except Exception:  # transformers lets the exceptions of its parsers through
        values = dict(values)
    of_all = PretrainedConfig().to_dict().keys() - {"model_type"}
    return dict(_of_the_model(values, {*of_all, *_NOT_OF_THE_MODEL}))


def _of_the_model(values: Mapping[str, Any], left_out: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if key in left_out or key.endswith(("_token_id", "_version")):
            continue
        if isinstance(value, dict):
            yield from _of_the_model(value, left_out, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def for_all_readers(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values``, the content of a config.json, with what the class of any version reads, and without ``auto_map``.

    Keys that are there keep their values, unless these are null. Where transformers would no longer read the same RoPE,
    nothing is added to it: some classes that 4.57 does not have take no older keys.
    """
    complete = _completed(values, with_rope=True)
    return complete if _ropes_read(complete) == _ropes_read(values) else _completed(values, with_rope=False)


def _completed(values: Mapping[str, Any], *, with_rope: bool) -> dict[str, Any]:
    read = {
        key: _completed(value, with_rope=with_rope) if _is_config(value) else value for key, value in values.items()
    }
    for key in _LEFT_OUT:
        read.pop(key, None)
    dtype = read.get("dtype", read.get("torch_dtype"))
    if dtype is not None:
        read |= {"dtype": dtype, "torch_dtype": dtype}
    parameters = read.get("rope_parameters")
    if not parameters:
        read.pop("rope_parameters", None)
    elif with_rope:
        read |= {key: value for key, value in _old_rope(parameters, read).items() if read.get(key) is None}
    return read


def _ropes_read(values: Mapping[str, Any]) -> Any:
    """The parameters of RoPE that transformers reads from ``values``, of each part of the model; else its error."""
    try:
        parts = {"": _written(_parsed(values))}
    except Exception as problem:  # transformers lets the exceptions of its parsers through
        return str(problem)
    parts |= {key: value for key, value in parts[""].items() if _is_config(value)}
    return {key: _rope(value) for key, value in parts.items()}


def _parsed(values: Mapping[str, Any]) -> Any:
    """The configuration that transformers reads from ``values``, the content of a config.json."""
    from transformers import AutoConfig

    given = copy.deepcopy(dict(values))  # as of 5.23 (2026-11), transformers writes into the dictionaries that it gets
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that only 4.57 reads
        return AutoConfig.for_model(given.pop("model_type", None), **given)


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and "model_type" in value


def _written(config: Any) -> dict[str, Any]:
    """What transformers writes for ``config``, with infinity as such: 5 writes an object, which 4.57 does not read."""
    values: dict[str, Any] = json.loads(config.to_json_string(), object_hook=special_float)
    return values


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of RoPE, without the older name of ``rope_type`` that a base may give beside it."""
    return {key: value for key, value in (values.get("rope_parameters") or {}).items() if key != "type"}


def _keys_of_rope(values: Mapping[str, Any]) -> set[str]:
    return {"rope_scaling", "rope_parameters", *_old_rope(values.get("rope_parameters") or {"rope_theta": 0}, values)}


def _old_rope(parameters: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The ``parameters`` of RoPE under the keys of 4.57, for the config.json ``values``.

    transformers 5 has them by layer type for models that alternate between global and local attention. In 4.57,
    local attention has only a base frequency of its own.
    """
    by_layer = {kind: each for kind, each in parameters.items() if isinstance(each, dict)}
    local = by_layer.get("sliding_attention")
    if by_layer:
        parameters = by_layer.get("full_attention") or next(iter(by_layer.values()))
    old = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if parameters.get(key) is not None}
    if local:
        old["rope_local_base_freq"] = local.get("rope_theta")
    kind = values.get("model_type")
    names = _NAMES_OF_ROPE.get(str(kind), {})
    old = {names.get(key, key): value for key, value in old.items()}

    scaling = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if kind in _STRICT_SCALING:
        scaling["type"] = scaling.pop("rope_type", scaling.get("type"))
        original = "original_max_position_embeddings"
        if scaling.get(original) == values.get(original):
            scaling.pop(original, None)
    is_default = scaling.get("rope_type", scaling.get("type", "default")) == "default"
    old["rope_scaling"] = None if is_default and len(scaling) <= 1 else scaling
    return old
