"""What DeepSpeed's configuration may hold, asked of the installed DeepSpeed: ``python -m panda.engine.deepspeed_keys``.

That command writes ``deepspeed_keys.json``, which panda reads instead of importing DeepSpeed. Half of the
sections are pydantic models, which describe themselves. DeepSpeed looks up the rest key by key and ignores
what it does not know; its parser is given a dictionary that records what is looked up, with which default.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any
from typing import Literal
from typing import Union
from typing import get_args
from typing import get_origin

KEYS_FILE = Path(__file__).with_name("deepspeed_keys.json")
_BOUNDS = {"ge": "minimum", "le": "maximum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum"}
_TYPES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    dict: "object",
    list: "array",
    type(None): "null",
}


class _Recording(dict[str, Any]):
    """A section of a configuration that remembers the keys that are looked up in it, and their defaults."""

    def __init__(self, **sections: Any) -> None:
        super().__init__(**sections)
        self.seen: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        self.seen[key] = default
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.seen.setdefault(str(key), None)
        return super().__contains__(key)

    def keys(self) -> Any:  # DeepSpeed writes `key in section.keys()`
        return self

    def __deepcopy__(self, memo: object) -> _Recording:
        return self


def deepspeed_keys() -> dict[str, Any]:
    """The keys of the installed DeepSpeed, as a JSON schema, and the removed ones with what it says of each.

    Sections of which panda takes nothing are described as ``{}``.
    """
    import deepspeed
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime import config as parser
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
    from deepspeed.utils.logging import log_levels

    sections = {name: _Recording() for name in ("aio", "flops_profiler", "timers")}
    checkpoint = _Recording(parallel_write=_Recording())
    root = _Recording(train_batch_size=1, checkpoint=checkpoint, **sections)
    parser.DeepSpeedConfig(root)

    keys = _recorded(root)
    keys["zero_optimization"] = _modelled(DeepSpeedZeroConfig)
    keys["comms_logger"] = _modelled(CommsLoggerConfig)
    keys |= _modelled(DeepSpeedMonitorConfig)["properties"]
    keys["timers"]["properties"]["throughput"] = _modelled(DeepSpeedThroughputTimerConfig)
    # What the parser, or the engine, does with a value after it has looked it up.
    keys["steps_per_print"] = {"type": ["integer", "null"]}
    keys["vocabulary_size"] = {"type": "integer"}
    keys["log_level"] = {"enum": sorted(log_levels)}
    for key in ("communication_data_type", "seq_parallel_communication_data_type"):
        keys[key] = {"enum": ["fp16", "bf16", "fp32"]}
    modes = parser.CHECKPOINT_TAG_VALIDATION_MODES
    keys["checkpoint"]["properties"]["tag_validation"] = {"enum": [*modes, *map(str.capitalize, modes)]}
    keys["flops_profiler"]["properties"]["output_file"] = {"type": ["string", "null"]}

    removed = parser._REMOVED_TOP_LEVEL_CONFIG_KEYS
    removed = {
        **removed,
        **{f"zero_optimization.{key}": text for key, text in parser._REMOVED_ZERO_CONFIG_KEYS.items()},
    }
    keys = {key: schema for key, schema in keys.items() if key not in removed}
    return {"version": deepspeed.__version__, "removed": removed, "properties": keys}


def _recorded(section: _Recording) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for key, default in sorted(section.seen.items()):
        value = dict.get(section, key)
        if isinstance(value, _Recording):
            properties[key] = _object(_recorded(value))
        else:
            properties[key] = {} if default is None else {"type": _TYPES[type(default)]}
    return properties


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def _modelled(model: Any) -> dict[str, Any]:
    # Not ``model_json_schema``: pydantic cannot write the functions that DeepSpeed attaches to deprecated fields.
    properties = {}
    for name, field in sorted(model.model_fields.items()):
        value = _of_type(field.annotation)
        for bound in field.metadata:
            value |= {key: getattr(bound, short) for short, key in _BOUNDS.items() if hasattr(bound, short)}
        extra = field.json_schema_extra or {}
        if extra.get("deprecated"):
            value["renamed"] = extra["new_param"]
        # A field with an alias has two names; DeepSpeed documents the alias.
        properties[field.alias or name] = value
    return _object(dict(sorted(properties.items())))


def _of_type(annotation: Any) -> dict[str, Any]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        merged: dict[str, Any] = {}
        types = []
        for argument in arguments:
            option = _of_type(argument)
            types.append(option["type"])
            merged |= option
        return merged | {"type": types}
    if origin is Literal:
        return {"enum": list(arguments)}
    if hasattr(annotation, "model_fields"):
        return _modelled(annotation)
    kind = origin or annotation
    if issubclass(kind, Enum):
        return {"enum": sorted({member.value for member in kind})}
    if issubclass(kind, list) and arguments:
        return {"type": "array", "items": _of_type(arguments[0])}
    return {"type": "string" if issubclass(kind, Path) else _TYPES[kind]}


if __name__ == "__main__":
    KEYS_FILE.write_text(json.dumps(deepspeed_keys(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
