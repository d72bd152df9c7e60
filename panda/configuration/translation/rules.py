"""What a key of another tool can mean, and the meanings that several tools share."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from panda.weights.hub import is_name


@dataclass(frozen=True)
class To:
    """A key of panda with the same value."""

    key: str

    @property
    def advice(self) -> str:
        return f"write `{self.key}`."


@dataclass(frozen=True)
class Sets:
    """Keys of panda, by the value. A value that is null, false, zero or empty and not listed means panda's default."""

    values: Mapping[Any, Mapping[str, Any]]
    otherwise: str
    """Of any other value: why it has no counterpart, and what to do."""
    notes: Mapping[Any, str] = field(default_factory=dict)
    """Of some values: in what panda differs."""

    @property
    def advice(self) -> str:
        first = next((keys for keys in self.values.values() if keys), None)
        if first is None:
            return f"leave it out for {' or '.join(map(shown, self.values))}. For others: {self.otherwise}."
        return f"write {' and '.join(f'`{key}: {shown(value)}`' for key, value in first.items())}."


@dataclass(frozen=True)
class Part:
    """Read together with other keys, by the function of its tool or by `combine`."""

    advice: str


@dataclass(frozen=True)
class Ignored:
    """Changes nothing that is learned."""

    reason: str

    @property
    def advice(self) -> str:
        return f"leave it out: {self.reason}."


@dataclass(frozen=True)
class Absent:
    """No counterpart, unless the value is null, false, zero or empty: then panda does the same."""

    reason: str

    @property
    def advice(self) -> str:
        return f"not translated: {self.reason}."


Rule = To | Sets | Part | Ignored | Absent


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
        self.set(
            key,
            named[0] if len(named) == 1 else named,
            f"{because}: a name on the hub, a file or a folder",
        )

    def value(self, key: str) -> Any:
        """The value of panda's ``key``; None if it is not written."""
        return self.lines[key].value if key in self.lines else None

    def drop(self, key: str) -> None:
        """Leave panda's ``key`` out again."""
        self.lines.pop(key, None)

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


def on_hub(path: str, item: Mapping[str, Any], configuration: str = "name") -> tuple[str, set[str]]:
    """The name ``path`` of a data set on the hub with what ``item`` chooses of it, and the keys that said it.

    ``configuration``: the key of its configuration. A path of another form is left as it is, as is a part of a split.
    """
    split, used = item.get("split"), {configuration, "split", "revision"}
    if not is_name(path) or (split and not str(split).isidentifier()):
        return path, set()
    chosen = [item.get(configuration), split if split != "train" else None]
    revision = item.get("revision")
    choice = "".join(f":{part}" for part in chosen if part not in (None, "", "default"))
    return f"{path}{choice}{f'@{revision}' if revision else ''}", used


def read_validation_share(key: str, theirs: Theirs, found: Translation) -> None:
    """``key``, which below 1 is a share of the samples that is held out, and from 1 on their number."""
    held_out = number(theirs(key))
    if held_out and held_out < 1:
        found.set("eval_fraction", held_out, theirs.because(key))
    elif held_out:
        found.lost[f"{key}: {whole(held_out)}"] = (
            "panda holds out a share of the samples: write it with `eval_fraction`, or name a file with `eval_data_dir`"
        )


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
    return int(value) if value == int(value) else value


# Rules of every table.
VALIDATION_SHARE = Part("write the share that is held out with `eval_fraction`, or name a file with `eval_data_dir`.")
"""Read by ``read_validation_share``."""
FROM_ADAPTER = Absent("name the adapter's folder with `ckpt_path`: training goes on from it")
NOTHING_HELD_OUT = "`eval_steps` needs held-out data: write `eval_fraction`, or `eval_data_dir`"
HUB_CHOICE = Part("write it after the name: `instruction_tuning_data_dir: OWNER/NAME:CONFIGURATION:SPLIT@REVISION`.")
HUB_PART = Absent("panda reads a split of a data set, or files: download this part of it, and name its folder")

SERVICES = Absent(
    "panda writes metrics.jsonl and tensorboard/ into the run directory, and sends nothing to a service; a lifecycle"
    " plugin can (docs/plugins.md)"
)
REMOTE_CODE = Ignored("panda runs no code of checkpoints or data sets")
SPEED = Ignored("it is about speed; panda chooses what is faster and changes nothing")
PROCESSES = Ignored("it is about processes; panda prepares data on all cores")
DISPLAY = Ignored("it is about what is shown")
KEPT_DATA = Ignored("panda keeps tokenised data in its cache and finds it by content")
PADDING = Ignored("panda pads to the longest row of a micro batch, and padding is never learned")
TOKENS = Absent("panda takes special tokens from the tokenizer; if they differ, change them in the tokenizer's folder")
LORA_MORE = Absent("panda trains adapters on linear layers, and nothing beside them")
ALL_LOSS = Absent("in panda only answers carry loss; `task: pretrain` gives every token loss")
OTHER_LOSS = Absent("panda trains with cross-entropy")
OTHER_TRAINING = Absent("panda trains all weights, or LoRA adapters on linear layers (`use_lora`)")
OTHER_PARALLELISM = Absent("panda's ranks are data-parallel, and tensor-parallel by `tensor_parallel_size`")
HUB_UPLOAD = Absent("panda uploads nothing; RUN/export is a folder that `hf upload` takes")
