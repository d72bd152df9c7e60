"""How many positions a checkpoint has, by its configuration, whatever it calls them. Imports torch only if it must."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

from panda.registry import UserError
from panda.weights.formats import META

if TYPE_CHECKING:
    from panda.weights.pretrained import Pretrained

NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "n_ctx",
    "context_length",
    "seq_length",
    "seq_len",
    "model_max_length",
)
"""What configurations call their number of positions; the first that one states counts."""
_WHOLE_AS_STATED = ("gemma3", "gemma3_text", "gemma3n_text")
"""Model types that state their positions after stretching by a linear factor."""


@dataclass(frozen=True)
class Positions:
    """The positions that a model was made for."""

    count: int
    reason: str
    """Where the number is from, in words."""


def positions_of(config: Mapping[str, Any]) -> Positions | None:
    """The positions of the model that ``config``, a config.json, describes; None where nothing limits them.

    RoPE that is stretched by a factor has as many more: those that a linear or dynamic rule stretches, or the
    original ones that the others state.
    """
    stated = next(((name, config[name]) for name in NAMES if _is_count(config.get(name))), None)
    for inner in ("text_config", "llm_config"):
        if stated is None and isinstance(config.get(inner), Mapping):
            return positions_of(config[inner])
    if stated is None:
        return _by_default(config)
    name, count = stated
    stretched = _stretched(config, count)
    if stretched <= count:
        return Positions(count, f"{name} in its config.json")
    return Positions(stretched, f"{name}, stretched by the RoPE rule in its config.json")


def positions_of_checkpoint(pretrained: Pretrained) -> Positions | None:
    """The positions of the model in ``pretrained``; None where nothing limits them, or its format does not say."""
    is_known = pretrained.format is not META and "panda_model" not in pretrained.config
    return positions_of(pretrained.config) if is_known else None


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters of RoPE in ``config``: as in transformers those of the older key, where both are stated.

    Raises UserError where they are no object.
    """
    key = next((key for key in ("rope_scaling", "rope_parameters") if config.get(key)), None)
    if key is None:
        return {}
    if not isinstance(config[key], Mapping):
        raise UserError(
            f"ckpt_path: {key} in its config.json is {config[key]!r}; expected an object such as"
            ' {"rope_type": "linear", "factor": 2.0}, or null.'
        )
    rope: Mapping[str, Any] = config[key]
    return rope


def _stretched(config: Mapping[str, Any], count: int) -> int:
    rope = rope_of(config)
    rule, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
    if not isinstance(factor, int | float) or rule == "default" or config.get("model_type") in _WHOLE_AS_STATED:
        return count
    original = rope.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    if original is None and rule not in ("linear", "dynamic", "yarn"):
        return count
    return max(count, int(factor * (count if original is None or rule in ("linear", "dynamic") else original)))


def _by_default(config: Mapping[str, Any]) -> Positions | None:
    """The positions that transformers assumes where ``config`` states none."""
    from transformers import AutoConfig

    model_type: str = config.get("model_type", "")
    try:
        plain: Any = AutoConfig.for_model(model_type)
        count = getattr(plain.get_text_config(decoder=True), "max_position_embeddings", None)
    except Exception:  # the model is built later, and what is wrong reported then
        return None
    if count is None or not _is_count(count):
        return None
    return Positions(count, f"transformers' default for {model_type}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40
