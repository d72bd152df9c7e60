"""What a key of another tool can mean, and the meanings that several tools share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Hashable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from panda.registry import UserError
from panda.registry.location import problem_of_path
from panda.weights.hub import is_data_name

OFF = "leave it out: it is off in panda, too."


@dataclass(frozen=True)
class To:
    """A key of panda with the same value."""

    key: str

    def advice(self, value: Any) -> str:
        return f"write `{self.key}`."


@dataclass(frozen=True)
class Sets:
    """Keys of panda, by the value. A value that is null, false, zero or empty and not listed means panda's default."""

    values: Mapping[Any, Mapping[str, Any]]
    otherwise: str
    """Of any other value: why it has no counterpart, and what to do."""
    notes: Mapping[Any, str] = field(default_factory=dict)
    """Of some values: in what panda differs."""

    def advice(self, value: Any) -> str:
        if (ours := self.values.get(value) if isinstance(value, Hashable) else None) is not None:
            keys = " and ".join(f"`{key}: {shown(set_to)}`" for key, set_to in ours.items())
            return f"write {keys}." if keys else "leave it out: panda does so without being told."
        return f"{shown(value)} has no counterpart: {self.otherwise}." if value else OFF


@dataclass(frozen=True)
class Part:
    """Read together with other keys, by the function of its tool or by `combine`."""

    instead: str
    off: str = ""
    """The same where the value is false, if that is something else."""

    def advice(self, value: Any) -> str:
        return self.off if self.off and value is False else self.instead


@dataclass(frozen=True)
class Ignored:
    """Changes nothing that is learned."""

    reason: str

    def advice(self, value: Any) -> str:
        return f"leave it out: {self.reason}."


@dataclass(frozen=True)
class Absent:
    """No counterpart, unless the value is null, false, zero or empty: then panda does the same."""

    reason: str

    def advice(self, value: Any) -> str:
        return f"it has no counterpart: {self.reason}." if value else OFF


Rule = To | Sets | Part | Ignored | Absent
"""What a key means. ``advice(value)`` says what to write in place of the key with that value, in one sentence."""


@dataclass(frozen=True)
class Line:
    """A line of the translation."""

    value: Any
    because: str
    """The key that it comes from."""


@dataclass
class Translation:
    """A file of another tool in panda's keys, and what was not translated."""

    tool: str
    lines: dict[str, Line] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    """Keys with their values that have no counterpart, with the reason."""
    different: list[str] = field(default_factory=list)
    """What means nearly the same: in what panda differs."""
    ignored: dict[str, str] = field(default_factory=dict)
    """Keys that change nothing that is learned, with the reason."""

    def set(self, key: str, value: Any, because: str) -> None:
        """Write ``key: value``."""
        self.lines[key] = Line(value, because)

    def set_data(self, key: str, paths: Sequence[str], because: str) -> None:
        """Write the place of data sets as panda's ``key``: one path, or a list of them."""
        named = list(dict.fromkeys(paths))
        missing = [path for path in named if not (is_here(path) or is_data_name(re.split("[:@]", path)[0]))]
        if missing:
            because = f"{because}; name a file or folder of rows here in place of {', '.join(missing)}"
        self.set(key, named[0] if len(named) == 1 else named, because)

    def value(self, key: str) -> Any:
        """The value of panda's ``key``; None if it is not written."""
        return self.lines[key].value if key in self.lines else None

    def drop(self, key: str) -> None:
        """Leave panda's ``key`` out again."""
        self.lines.pop(key, None)

    def drop_all(self, keys: Iterable[str], reason: str) -> None:
        """Leave panda's ``keys`` out again, and list those of the file that they come from, with the ``reason``."""
        for line in [self.lines.pop(key) for key in keys if key in self.lines]:
            if " " not in line.because:  # no default
                self.ignored[line.because] = reason

    @property
    def evaluates(self) -> bool:
        """Whether the run has something to evaluate on, as far as it is written."""
        return not self.lines.keys().isdisjoint(("eval_data_dir", "eval_fraction"))


@dataclass(frozen=True)
class Theirs:
    """The keys of a file, nested ones by a path (`fsdp_config.offload_params`), over the defaults of its tool."""

    tool: str
    given: Mapping[str, Any]
    defaults: Mapping[str, Any]
    nulls: frozenset[str] = frozenset()
    """Keys that the file sets to null, which counts as left out."""

    def __call__(self, key: str) -> Any:
        """The value of ``key``, perhaps by default."""
        return self.given.get(key, self.defaults.get(key))

    def because(self, key: str) -> str:
        """Where the value of ``key`` is from."""
        return key if key in self.given else f"{self.tool}'s default of {key}"


@dataclass(frozen=True, eq=False)
class Tool:
    """What is known of one tool."""

    name: str
    keys: Mapping[str, Rule]
    """By key, or by a pattern: `wandb_*`."""
    defaults: Mapping[str, Any]
    """Values of keys that a file leaves out, where panda's default is another."""
    own: frozenset[str]
    """Keys by which a file of this tool is recognised."""
    read: Callable[[Theirs, Translation], None]
    """Translates what takes several keys: task, data, adapters. Raises UserError for a file that panda cannot follow
    at all, such as preference training."""


def each(keys: str, rule: Rule) -> dict[str, Rule]:
    """The same ``rule`` for all ``keys``, which spaces separate."""
    return dict.fromkeys(keys.split(), rule)


def read_item(item: Mapping[str, Any], said: str, rules: Mapping[str, Rule], found: Translation) -> None:
    """List the keys of ``item``, a data set that is called ``said``, that panda cannot follow, by ``rules``."""
    for key, value in flattened(item):
        rule = rule_of(rules, key)
        meant = ", ".join(map(str, value)) if isinstance(value, list) else value
        if rule is None:
            reason = "panda's table of keys lacks it: see whether it matters to you"
        elif isinstance(rule, Absent) or (isinstance(rule, Sets) and meant not in rule.values):
            reason = rule.reason if isinstance(rule, Absent) else rule.otherwise
        else:
            continue
        if value:
            found.lost[f"{said}.{key}: {shown(meant)}"] = reason


def places(item: Mapping[str, Any]) -> tuple[list[str], set[str]]:
    """Where the rows of a data set are, and the keys of ``item`` beside its path that this follows.

    Its files, where it names a loader for them; its name on the hub with the configuration, split and revision that it
    chooses, unless it takes a part of a split (`train[:10%]`); or its path.
    """
    files, path = item.get("data_files"), item.get("id") or item.get("path")
    named = [*files.values()] if isinstance(files, Mapping) else [files] if isinstance(files, str) else files or []
    if path in _LOADERS and named:
        return [str(place) for place in named], {"data_files"}
    configuration = next((item[key] for key in _CONFIGURATION if item.get(key)), "default")
    split, revision = item.get("split") or "train", item.get("revision")
    if not is_data_name(str(path)) or is_here(str(path)) or not str(split).isidentifier():
        return [str(path)], set()
    choice = [part for part, default in ((configuration, "default"), (split, "train")) if part != default]
    name = ":".join(map(str, [path, *choice]))
    return [f"{name}@{revision}" if revision else name], {*_CONFIGURATION, "split", "revision"}


def is_here(path: str) -> bool:
    """Whether there is a file or folder ``path``."""
    return problem_of_path(path) is None and Path(path).exists()


_CONFIGURATION = ("name", "config", "subset")
"""Keys of the configuration, as the tools call it."""
_LOADERS = (None, "json", "csv", "parquet", "arrow", "text")
"""Values of `path` beside which `data_files` names the files."""


def one_of(names: str | Sequence[str], instead: str) -> Sets:
    """Values that panda takes without being told, and of others what to do ``instead``."""
    return Sets({name: {} for name in (names.split() if isinstance(names, str) else names)}, instead)


def flattened(content: Mapping[str, Any], prefix: str = "", whole: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Keys and values of ``content``, nested ones by their path (`a.b`); those of ``whole`` stay as they are."""
    for key, value in content.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and path not in whole:
            yield from flattened(value, f"{path}.", whole)
        else:
            yield path, value


def rule_of(rules: Mapping[str, Rule], key: str) -> Rule | None:
    """What ``key`` means, by itself or by the longest pattern that it matches."""
    if key in rules:
        return rules[key]
    patterns = [pattern for pattern in rules if "*" in pattern and fnmatchcase(key, pattern)]
    return rules[max(patterns, key=len)] if patterns else None


def read_names(key: str, theirs: Theirs, *, commas: bool = False) -> list[str]:
    """The value of ``key``, a name or a list of them; with ``commas`` a text may have several.

    Raises UserError for anything else.
    """
    written = theirs(key) or []
    names = (written.split(",") if commas else [written]) if isinstance(written, str) else written
    if not isinstance(names, list) or any(isinstance(name, Mapping | list | bool | None) for name in names):
        raise UserError(f"{key}: expected a name or a list of names, not {shown(written)[:80]}.")
    return [str(name).strip() for name in names if name != ""]


def read_count(key: str, theirs: Theirs) -> int:
    """The value of ``key``, a whole number from 1 on. Raises UserError for anything else."""
    value = number(theirs(key))
    if value is None or not math.isfinite(value) or value < 1:
        raise UserError(f"{key}: expected a number from 1 on, not {shown(theirs(key))[:80]}.")
    return int(value)


def read_validation_share(key: str, theirs: Theirs, found: Translation) -> None:
    """``key``, which below 1 is a share of the samples that is held out, and from 1 on their number."""
    held_out = number(theirs(key))
    if held_out and held_out < 1:
        found.set("eval_fraction", held_out, theirs.because(key))
    elif held_out:
        found.lost[f"{key}: {whole(held_out)}"] = (
            "panda holds out a share of the samples: write it with `eval_fraction`, or name a file with `eval_data_dir`"
        )


def read_adapter(key: str, theirs: Theirs, found: Translation) -> None:
    """``key``, which names an adapter that training goes on from: then its own shape counts."""
    names = read_names(key, theirs, commas=True)
    if len(names) > 1:
        found.lost[f"{key}: {', '.join(names)}"] = (
            "panda goes on from one adapter: add the others to the base with peft, and name the result"
        )
    elif names:
        if base := found.lines.get("ckpt_path"):
            found.set("base_path", base.value, base.because)
        found.set("ckpt_path", names[0], key)
        found.drop_all(("lora_r", "lora_alpha", "lora_target_modules", "use_dora", "use_rslora"), FROM_ADAPTER)


def shown(value: Any) -> str:
    """``value`` as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else f"{value}"


def number(value: Any) -> float | None:
    """``value`` as a number, which YAML may read as a text (`1e-4`); None if it is none."""
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def whole(value: float) -> int | float:
    """``value`` as an integer where it is one."""
    return int(value) if math.isfinite(value) and value == int(value) else value


# Rules of every table.
VALIDATION_SHARE = Part("write the share that is held out with `eval_fraction`, or name a file with `eval_data_dir`.")
"""Read by ``read_validation_share``."""
ADAPTER = Part("name the adapter's folder with `ckpt_path`, and its base with `base_path`: training goes on from it.")
"""Read by ``read_adapter``."""
FROM_ADAPTER = "the adapter that training goes on from has its own"
NOTHING_HELD_OUT = "`eval_steps` needs held-out data: write `eval_fraction`, or `eval_data_dir`"
HUB_CHOICE = Part("write it after the name: `instruction_tuning_data_dir: OWNER/NAME:CONFIGURATION:SPLIT@REVISION`.")
HUB_PART = Absent("panda reads a split of a data set, or files: download this part of it, and name its folder")

SERVICES = Absent(
    "panda writes metrics.jsonl and tensorboard/ into the run directory, and sends nothing to a service; a lifecycle"
    " plugin can (docs/plugins.md)"
)
REMOTE_CODE = Ignored("panda runs no code of checkpoints or data sets")
SHUFFLED = Ignored("panda shuffles each epoch, by `seed`")
KEPT_ORDER = Absent("panda shuffles each epoch")
SPEED = Ignored("it is about speed; panda chooses what is faster and changes nothing")
PROCESSES = Ignored("it is about processes; panda prepares data on all cores")
MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog")
"""Fields in which panda finds a conversation."""
DISPLAY = Ignored("it is about what is shown")
KEPT_DATA = Ignored("panda keeps tokenised data in its cache and finds it by content")
PADDING = Ignored("panda pads to the longest row of a micro batch, and padding is never learned")
TOKENS = Absent("panda takes special tokens from the tokenizer; if they differ, change them in the tokenizer's folder")
LORA_MORE = Absent("panda trains adapters on linear layers, and nothing beside them")
ALL_LOSS = Absent("in panda only answers carry loss, or with `train_on_prompt` every token")
OTHER_LOSS = Absent("panda trains with cross-entropy")
OTHER_TRAINING = Absent("panda trains all weights, or LoRA adapters on linear layers (`use_lora`)")
OTHER_PARALLELISM = Absent("panda's ranks are data-parallel, and tensor-parallel by `tensor_parallel_size`")
DEFAULT_SYSTEM = Absent("write the system prompt into the rows: `system`, or a turn")
ROUTER_LOSS = Absent("write `router_aux_loss_coef`, with the value that the checkpoint's config.json has")
HUB_UPLOAD = Absent("panda uploads nothing; RUN/export is a folder that `hf upload` takes")
