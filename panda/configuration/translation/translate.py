"""A file of another tool to panda's keys: recognised, translated by its table, and written as flat YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from panda.configuration.options import RunOptions
from panda.configuration.translation import axolotl
from panda.configuration.translation import llama_factory
from panda.configuration.translation import trl
from panda.configuration.translation.rules import Absent
from panda.configuration.translation.rules import Ignored
from panda.configuration.translation.rules import Rule
from panda.configuration.translation.rules import Sets
from panda.configuration.translation.rules import Theirs
from panda.configuration.translation.rules import To
from panda.configuration.translation.rules import Tool
from panda.configuration.translation.rules import Translation
from panda.configuration.translation.rules import flattened
from panda.configuration.translation.rules import number
from panda.configuration.translation.rules import rule_of
from panda.configuration.translation.trainer import OPTIMIZERS
from panda.configuration.translation.trainer import SCHEDULES
from panda.configuration.translation.trainer import combine
from panda.files.terminal import printable_line
from panda.registry import UserError
from panda.registry.options import Given

TOOLS = {tool.name.lower(): tool for tool in (llama_factory.TOOL, axolotl.TOOL, trl.TOOL, trl.TRANSFORMERS)}
"""By the name that ``--from`` takes."""
LISTS = ("datasets", "pretraining_dataset", "test_datasets")
"""Keys whose value, a list of mappings, stays whole."""
ACCELERATE = {"compute_environment", "distributed_type", "mixed_precision", "num_machines"}
PANDAS = {
    "task",
    "arch",
    "ckpt_path",
    "instruction_tuning_data_dir",
    "pretraining_data_dir",
    "per_gpu_train_batch_size",
}
"""A file with one of these keys is panda's."""
_CAPITAL = re.compile("(?<=[a-z0-9])([A-Z])")
"""A capital within a word, as in `loraRank`."""
LONGEST = 80
"""Most characters of a value that are shown."""


def translate(path: Path, name: str | None = None) -> Translation:
    """The file at ``path``, of the tool with ``name`` or of the one that it looks like, in panda's keys.

    Raises UserError if it cannot be read, looks like no tool's, or says what panda cannot do at all.
    """
    content = _content(path)
    if name is not None and name.lower() not in TOOLS:
        raise UserError(f"--from {name}: expected one of {', '.join(TOOLS)}.")
    tool = TOOLS[name.lower()] if name else recognised(content)
    if len(ACCELERATE & content.keys()) > 1:
        raise UserError(
            f"{path}: a file of accelerate, which says how processes are started. Start panda with torchrun"
            " (docs/machines.md); `zero_stage` takes DeepSpeed's stage from such a file, and is 3 for FSDP."
        )
    if {"model", "train_dataset"} <= content.keys():
        raise UserError(
            f"{path}: a file of LLaMA-Factory's new, experimental engine (v1), whose keys are not known here."
        )
    if tool is None:
        raise UserError(
            f"{path}: its keys are not of a tool that is known: {', '.join(map(str, content))[:300]}."
            f" Name one with --from: {', '.join(TOOLS)}."
        )
    try:
        return translated(content, tool)
    except UserError as problem:
        raise UserError(f"{path}: {problem}") from None


def translated(content: Mapping[str, Any], tool: Tool) -> Translation:
    """What a file of ``tool`` says, in panda's keys. Raises UserError for what panda cannot do at all."""
    flat = dict(flattened(content, whole=LISTS))
    nulls = frozenset(key for key, value in flat.items() if value is None)
    given = {key: value for key, value in flat.items() if value is not None}
    theirs = Theirs(tool.name, given, tool.defaults, nulls)
    found = Translation(tool.name)
    for key in (*given, *(key for key in tool.defaults if key not in given)):
        _apply(rule_of(tool.keys, key), key, theirs, found)
    tool.read(theirs, found)
    combine(theirs, found)
    return found


def recognised(content: Mapping[str, Any]) -> Tool | None:
    """The tool that has most of the keys to itself, if any does."""
    scores = {tool: len(tool.own & content.keys()) for tool in TOOLS.values()}
    best = max(TOOLS.values(), key=lambda tool: scores[tool])
    return best if scores[best] else None


def looks_like(path: Path) -> str | None:
    """The tool whose file is at ``path``, where a configuration of panda is expected; None if it may be panda's."""
    try:
        content = _content(path)
    except UserError:
        return None  # what reads it as panda's says why
    if PANDAS & content.keys():
        return None
    if len(ACCELERATE & content.keys()) > 1:
        return "accelerate"
    tool = recognised(content)
    foreign = [key for key in content if tool and key in tool.keys and key not in OURS]
    nested = any(isinstance(value, Mapping | list) for value in content.values())
    return tool.name if tool and len(foreign) >= (2 if nested else 4) else None


def _apply(rule: Rule | None, key: str, theirs: Theirs, found: Translation) -> None:
    """Translate ``key``. One that the file leaves out gives way to what it says by another key."""
    value, because = theirs(key), theirs.because(key)
    if isinstance(value, str) and (as_number := number(value)) is not None:
        value = as_number
    if isinstance(rule, To):
        if not (value is False or value == "" or (key not in theirs.given and rule.key in found.lines)):
            found.set(rule.key, value, because)
    elif isinstance(rule, Sets):
        meant = value.lower() if isinstance(value, str) else value
        if not isinstance(meant, Mapping | list) and meant in rule.values:
            for ours, set_to in rule.values[meant].items():
                if key in theirs.given or ours not in found.lines:
                    found.set(ours, set_to, because)
            if meant in rule.notes:
                found.different.append(f"{key}: {rule.notes[meant]}")
        elif value:
            found.lost[said(key, value)] = rule.otherwise
    elif isinstance(rule, Absent):
        if value:
            found.lost[said(key, value)] = rule.reason
    elif isinstance(rule, Ignored):
        found.ignored[key] = rule.reason
    elif rule is None and value:
        found.lost[said(key, value)] = f"panda's table of {theirs.tool}'s keys lacks it: see whether it matters to you"


def said(key: str, value: Any) -> str:
    """``key: value`` on one line."""
    text = " ".join((value if isinstance(value, str) else json.dumps(value, default=str)).split())
    return printable_line(f"{key}: {text if len(text) <= LONGEST else f'{text[:LONGEST]}...'}")


def written(found: Translation, path: Path) -> str:
    """The translation as flat YAML, each line with the key that it comes from; after it, what was not translated."""
    order = [field.name for field in fields(RunOptions)]
    keys = sorted(found.lines, key=lambda key: order.index(key) if key in order else len(order))
    lines = [f"# {path.name}, a file of {found.tool}, in panda's keys (`panda translate`).", ""]
    for key in keys:
        line = found.lines[key]
        because = printable_line(" ".join(line.because.split()))
        lines.append(f"{f'{key}: {_yaml(line.value)}':<56}  # {because}")
    return "\n".join([*lines, *(f"# {line}" if line else "" for line in remarks(found))]) + "\n"


def remarks(found: Translation) -> list[str]:
    """What was not translated, or means something else, as lines of text."""
    lines = []
    if found.lost:
        lines += ["", "Without a counterpart:"]
        by_reason: dict[str, list[str]] = {}
        for what, why in found.lost.items():
            by_reason.setdefault(why, []).append(f"  {printable_line(what)}")
        for why, what_all in by_reason.items():
            lines += [*what_all, f"      {why}."]
    if found.different:
        lines += ["", "Not quite the same:", *(f"  {printable_line(text)}" for text in dict.fromkeys(found.different))]
    if found.ignored:
        lines += ["", "Left out, since nothing that is learned depends on it:"]
        keys_by_reason: dict[str, list[str]] = {}
        for key, why in found.ignored.items():
            keys_by_reason.setdefault(why, []).append(key)
        lines += [f"  {', '.join(keys)}: {why}." for why, keys in keys_by_reason.items()]
    return lines


def _yaml(value: Any) -> str:
    whole = value if isinstance(value, list | tuple) else [value]
    text = yaml.safe_dump(list(whole), default_flow_style=True, width=10**6, allow_unicode=True).strip()
    return text if isinstance(value, list | tuple) else text[1:-1]


def _content(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        json.dumps(content, default=str)  # refuses an anchor that holds itself
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"{path}: cannot be read: {getattr(problem, 'strerror', None) or problem}.") from None
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as problem:
        raise UserError(f"{path}: neither YAML nor JSON: {' '.join(str(problem).split())}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys with values, as in a configuration of {', '.join(TOOLS)}.")
    return {str(key): value for key, value in content.items()}


def _ours() -> frozenset[str]:
    keys = {field.name for field in fields(RunOptions)} | PANDAS
    rules = [rule for tool in TOOLS.values() for rule in tool.keys.values()]
    keys |= {rule.key for rule in rules if isinstance(rule, To)}
    keys |= {key for rule in rules if isinstance(rule, Sets) for values in rule.values.values() for key in values}
    return frozenset(keys | {"template", "warmup_steps", "warmup_proportion", "content_field", "rope_scaling"})


OURS = _ours()
"""Keys of panda that a tool's table leads to, or that a tool spells in the same way."""


def advice(given: Mapping[str, Given]) -> dict[str, str]:
    """What to write in place of those of the ``given`` keys that are of another tool, with the values that they have.

    For `optimizer` and `lr_scheduler` where their value is a name that another tool has.
    """
    found: dict[str, str] = {}
    for key, each in given.items():
        theirs = _CAPITAL.sub(r"_\1", key).lower()
        if is_of_another_tool(theirs):
            rule = next(rule for tool in TOOLS.values() if (rule := _rule(tool, theirs)))
            found[key] = rule.advice(_plain(each.value))
    for key, names in (("optimizer", OPTIMIZERS), ("lr_scheduler", SCHEDULES)):
        if key in given and isinstance(value := _plain(given[key].value), str) and value in names.values:
            found[key] = names.advice(value)
    return found


def is_of_another_tool(key: str) -> bool:
    """Whether ``key``, perhaps a path (`a.b`), is one of a tool, and none of panda's."""
    return key not in OURS and any(_rule(tool, key) for tool in TOOLS.values())


def _rule(tool: Tool, key: str) -> Rule | None:
    """What ``key`` means to ``tool``: a path by the pattern of a path, too, and not by `peft*`."""
    if "." not in key:
        return tool.keys.get(key)
    return rule_of({theirs: rule for theirs, rule in tool.keys.items() if "." in theirs}, key)


def _plain(value: Any) -> Any:
    """``value``, of YAML or of a flag, as the tables have it."""
    if not isinstance(value, str):
        return value
    words = {"true": True, "false": False, "null": None, "none": None}
    as_number = number(value)
    return as_number if as_number is not None else words.get(value.lower(), value.lower())
