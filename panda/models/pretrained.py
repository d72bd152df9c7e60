"""The checkpoint that a run starts from: where it is, what it says of itself, and how a run follows it.

Reads JSON and looks at names of files; imports torch only when tensors are asked for. What it finds
wrong is told in under a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from panda.models.delta import applied
from panda.models.delta import check_base
from panda.models.delta import is_delta
from panda.models.hub import Repository
from panda.models.hub import cached
from panda.models.hub import described
from panda.models.hub import is_name
from panda.models.identity import identity
from panda.models.meta_format import PARAMS
from panda.models.meta_format import SHARDS
from panda.models.meta_format import meta_config
from panda.models.meta_format import meta_weights
from panda.models.shards import PICKLES
from panda.models.shards import SAFETENSORS
from panda.models.shards import Kind
from panda.models.shards import shard_names
from panda.models.shards import shards
from panda.models.tokenizers import TOKENIZER
from panda.models.tokenizers import has_tokenizer
from panda.registry import UserError
from panda.registry.options import options_of
from panda.registry.resolve import Chosen
from panda.registry.resolve import Resolved
from panda.registry.resolve import Setting

if TYPE_CHECKING:
    import torch

    from panda.run_options import RunOptions
    from panda.stored_tensor import Weights

CONFIG = "config.json"
ADAPTERS = "adapter_config.json"
"""What a folder of peft's has in its place."""

SHELF = Path("pretrained-models")
"""Where PandaLLM's documentation has users put their checkpoints."""

_FROM_CACHE = "Hugging Face hub, from its cache"

_BESIDE = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
"""What belongs to a checkpoint beside its configuration and weights."""


@dataclass(frozen=True)
class Format:
    """A way to keep a model in a folder."""

    name: str
    files: str
    """Pattern of the names of its files of weights, and of their index."""
    kind: Kind
    """The names of its files of weights."""
    config: Callable[[Path], dict[str, Any]]
    weights: Callable[[Path], Weights]
    is_pickle: bool


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint on disk; nothing of its weights is read yet."""

    folder: Path
    found: str
    """Where it was found, in words."""
    format: Format
    config: Mapping[str, Any]
    """Its config.json, or what that would say."""
    base: Pretrained | None = None
    """Where it is a delta: what it is added to."""
    repository: Repository | None = None
    """What its weights are fetched from, where the hub has them and its cache has not."""
    name: str | None = None
    """Its name on the hub, where it was found by that."""

    def fetch(self) -> None:
        """Have its files of weights here. Raises UserError where the hub does not give them."""
        if self.repository:
            self.repository.fetch(shard_names(self.folder, self.format.kind, self.repository.files))

    def weights(self) -> Weights:
        """Its tensors, by name; the headers of all files are read, and checked. Raises UserError for a damaged one.

        Where they are on the hub they are fetched first.
        """
        self.fetch()
        weights = self.format.weights(self.folder)
        if self.base is None:
            return weights
        return applied(weights, self.base.weights(), source=str(self.folder), base_source=str(self.base.folder))

    def with_tokenizer(self) -> Pretrained | None:
        """Itself, or its base where that alone has a tokenizer; None where neither has."""
        if has_tokenizer(self.folder):
            return self
        return self.base.with_tokenizer() if self.base else None

    def files_beside(self) -> list[Path]:
        """Files of its tokenizer, chat template and generation config."""
        return sorted(file for pattern in _BESIDE for file in self.folder.glob(pattern) if file.is_file())

    def identity(self, like: str | None = None) -> str:
        """What tells its weights from others; with ``like``, one that was recorded, in the form of that."""
        self.fetch()
        base = self.base.identity(like) if self.base else None
        return identity(shards(self.folder, self.format.kind), base, like)

    def describe(self) -> str:
        """One line: what was found, where."""
        kind = "a delta, " if self.base else ""
        line = f"{self.folder} ({self.found}): {kind}{self.format.name}, {self.config['model_type']}"
        return f"{line}; added to {self.base.describe()}" if self.base else line


def find_here(location: str) -> Path | None:
    """The folder that ``location`` means, itself or in ``pretrained-models``; the hub is not asked."""
    path = Path(location).expanduser()
    shelved = SHELF / location
    if path.is_dir():
        return path
    return shelved if len(path.parts) == 1 and shelved.is_dir() else None


def find_pretrained(run: RunOptions) -> Pretrained | None:
    """The checkpoint that ``run`` names, with its base where it is a delta; None where there is none."""
    if run.ckpt_path is None:
        return None
    return whole_at(run.ckpt_path, run.base_path, allow_pickle=run.allow_pickle)


def whole_at(
    location: str,
    base_path: str | None,
    *,
    option: str = "ckpt_path",
    allow_pickle: bool = False,
    quantised: bool = False,
) -> Pretrained:
    """The checkpoint at ``location``, of which ``option`` told, with its base where it is a delta.

    Raises UserError for a delta without ``base_path``, and for anything else with it.
    """
    pretrained = pretrained_at(location, option=option, allow_pickle=allow_pickle, quantised=quantised)
    if not is_delta(pretrained.folder, location):
        if base_path is not None:
            raise UserError(
                f"base_path: {location!r} is no delta, so nothing is added to it. Leave base_path out; a delta's"
                " name ends in `-delta`."
            )
        return pretrained
    if base_path is None:
        raise UserError(
            f"{option}: {location!r} is a delta: the difference to the weights that it was trained from, and no"
            " model by itself. Name those with `base_path`, and panda adds the two while it loads; `panda delta apply`"
            " writes the sum to a folder."
        )
    return added_to(pretrained, base_path, option="base_path", allow_pickle=allow_pickle)


def added_to(delta: Pretrained, base_path: str, *, option: str, allow_pickle: bool) -> Pretrained:
    """``delta`` with the base at ``base_path``, of which ``option`` told. Raises UserError where it cannot be that."""
    base = pretrained_at(base_path, option=option, allow_pickle=allow_pickle)
    if is_delta(base.folder, base_path):
        raise UserError(f"{option}: {base_path!r} is a delta itself. Name the whole model.")
    check_base(delta, base)
    return replace(delta, base=base)


def base_weights(pretrained: Pretrained | None, like: str | None = None) -> str:
    """What adapters are trained on, in a word that tells it from other weights; in the form of ``like``, if that is."""
    return pretrained.identity(like) if pretrained else "random"


def pretrained_at(location: str, *, option: str, allow_pickle: bool = False, quantised: bool = False) -> Pretrained:
    """The checkpoint at ``location``: a folder, one in ``pretrained-models``, or a name on the hub, in that order.

    One whose weights are ``quantised`` answers, and cannot be trained. Raises UserError where there is none.
    """
    folder, found, name, repository = _locate(location, option, allow_pickle)
    names = repository.files if repository else tuple(file.name for file in folder.iterdir())
    format_ = _format_of(folder, names, option)
    if format_.is_pickle and not allow_pickle:
        raise UserError(
            f"{option}: {folder} holds its weights in pickles ({format_.files}), and loading one can run code that is"
            " in it. If you trust where it comes from, say `--allow_pickle`; panda then loads it with torch's"
            " `weights_only`, which takes tensors alone."
        )
    config = format_.config(folder)
    if "quantization_config" in config and not quantised:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UserError(
            f"{option}: the weights in {folder} are quantised ({method}), and cannot be trained. Give the checkpoint"
            " that they were made from."
        )
    return Pretrained(folder, found, format_, config, None, repository, name)


def follow_checkpoint(resolved: Resolved) -> Resolved:
    """``resolved`` with what its checkpoint has a say on: options of the model that nobody set, and the tokenizer.

    Raises UserError where what was set contradicts the checkpoint.
    """
    pretrained = find_pretrained(resolved.core)
    if pretrained is None:
        return resolved
    settings = dict(resolved.settings)
    model = resolved.components["model"]
    says = f"checkpoint {pretrained.folder}"
    if hasattr(model.component.options, "of_checkpoint"):
        model = _follow_options(model, settings, pretrained.config, says)
    core = resolved.core
    positions = pretrained.config.get("max_position_embeddings")
    if positions is not None and core.max_seq_length > positions:
        raise UserError(
            f"max_seq_length: {core.max_seq_length} ({settings['max_seq_length'].origin}), and {pretrained.folder} is"
            f" made for {positions} positions (max_position_embeddings in its {CONFIG}). Lower max_seq_length."
        )
    if settings["tokenizer"].origin == "default":
        holder = pretrained.with_tokenizer()
        if holder is None:
            raise UserError(
                f"ckpt_path: {pretrained.folder} has no tokenizer that transformers loads (none of"
                f" {', '.join(TOKENIZER)}), and panda's own is for other weights. Name the folder of one with"
                " `tokenizer`."
            )
        if pretrained.format is META and not (holder.folder / "tokenizer.json").exists():
            raise UserError(
                f"ckpt_path: the tokenizer in {holder.folder} is a SentencePiece model alone, as Meta gives it. Name"
                " the folder of a Hugging Face tokenizer of this model with `tokenizer`."
            )
        location = holder.name or str(holder.folder)
        settings["tokenizer"] = Setting("tokenizer", location, says, settings["tokenizer"].owner)
        core = replace(core, tokenizer=location)
    return replace(resolved, core=core, settings=settings, components={**resolved.components, "model": model})


def config_for(pretrained: Pretrained, entries: int, *, extend: bool) -> Mapping[str, Any]:
    """``pretrained.config``, with rows for a tokenizer of ``entries`` entries if it may be extended.

    Raises UserError where it has too few, and may not.
    """
    rows = pretrained.config.get("vocab_size")
    if rows is None or entries <= rows:
        return pretrained.config
    if not extend:
        raise UserError(
            f"tokenizer: it has {entries:,} entries, and the checkpoint in {pretrained.folder} {rows:,} rows for them"
            " (vocab_size). Is it the tokenizer of these weights? If entries were added to it, `--extend_vocab` adds"
            " rows, each the mean of those that are there."
        )
    return {**pretrained.config, "vocab_size": entries}


def fitted(module: torch.nn.Module, pretrained: Pretrained) -> Weights:
    """The tensors of ``pretrained`` for each name in ``module``. Raises UserError where they do not fit."""
    from panda.models.matching import matched

    rows, wanted = pretrained.config.get("vocab_size"), getattr(getattr(module, "config", None), "vocab_size", None)
    grow = (rows, wanted) if rows and wanted and wanted > rows else None
    return matched(module, pretrained.weights(), source=str(pretrained.folder), grow_rows=grow)


def _follow_options(model: Chosen, settings: dict[str, Setting], config: Mapping[str, Any], says: str) -> Chosen:
    """``model`` with the options that ``config`` gives; ``settings`` are brought to agree."""
    options_class: Any = model.component.options
    known = options_of(options_class)
    values = {key: getattr(model.options, key) for key in known}
    contradictions = []
    for key, value in options_class.of_checkpoint(config).items():
        written = key if settings.get(key) and settings[key].owner == model.label else f"model.{key}"
        setting = settings[written]
        value = known[key].check(value)
        # A fine-tune may have more entries than the family's first tokenizer, which an arch states.
        is_given = setting.origin != "default" and not (key == "vocab_size" and setting.origin.startswith("arch "))
        if not is_given:
            settings[written] = replace(setting, value=value, origin=says)
            values[key] = value
        elif setting.value != value:
            contradictions.append(f"{key} is {setting.value} ({setting.origin}), and {value} in the checkpoint")
    if contradictions:
        raise UserError(
            f"{says} is of another shape:\n"
            + "\n".join(contradictions)
            + f"\nLeave arch and these options out: `model: {model.component.name}` takes the checkpoint's own shape."
        )
    return replace(model, options=options_class(**values))


def _locate(location: str, option: str, allow_pickle: bool) -> tuple[Path, str, str | None, Repository | None]:
    """The folder, where it was found, its name on the hub, and what its weights are to be fetched from."""
    path = Path(location).expanduser()
    shelved = SHELF / location
    if here := find_here(location):
        return here, "a folder" if here == path else f"in ./{SHELF}", None, None
    looked = [f"the folder {path.absolute()}"]
    if len(path.parts) == 1:
        looked.append(f"the folder {shelved.absolute()}")
    if path.exists():
        raise UserError(f"{option}: {location!r} is a file. Name the folder that it is in.")
    name = location if is_name(location) else None
    if name or len(path.parts) == 1:
        snapshot = cached(location)
        has_weights = snapshot is not None and _has_weights(snapshot, allow_pickle)
        if snapshot and has_weights and has_tokenizer(snapshot):
            return snapshot, _FROM_CACHE, name, None
        looked.append(f"{location} in the cache of the Hugging Face hub{', which has a part of it' * bool(snapshot)}")
    if name:  # those without an owner are of a few old models, and more often a misspelt folder
        try:
            repository = described(name)
        except UserError as problem:
            if snapshot and has_weights:
                return snapshot, _FROM_CACHE, name, None
            raise UserError(
                f"{option}: {location!r} is not here: looked for {'; '.join(looked)}. And {problem}"
            ) from None
        return repository.folder, "Hugging Face hub", name, repository
    raise UserError(f"{option}: {location!r} is nowhere. Looked for " + "; ".join(looked) + ".")


def _has_weights(snapshot: Path, allow_pickle: bool) -> bool:
    """Whether ``snapshot`` has all its files of weights, in a format that may be read."""
    there = {file.name for file in snapshot.iterdir()}
    format_ = _format_among(there)
    if format_ is None or (format_.is_pickle and not allow_pickle):
        return False
    return there.issuperset(shard_names(snapshot, format_.kind, there))


def _format_among(names: Collection[str]) -> Format | None:
    return next((format_ for format_ in FORMATS if any(fnmatch(name, format_.files) for name in names)), None)


def _format_of(folder: Path, names: Collection[str], option: str) -> Format:
    """The format of what is in ``folder``, or can be fetched to it: files of these ``names``."""
    format_ = _format_among(names)
    if format_ is None:
        if (folder / CONFIG).exists():
            raise UserError(f"{option}: {folder} has no weights: none of {', '.join(f.files for f in FORMATS)}.")
        format_ = FORMATS[0]
    needed = PARAMS if format_ is META else CONFIG
    if not (folder / needed).exists():
        seen = f"it has {', '.join(sorted(names)[:6])}{', ...' if len(names) > 6 else ''}" if names else "it is empty"
        raise UserError(
            f"{option}: {folder} has no {needed}, so it is no checkpoint of a model; {seen}.{_instead(folder)}"
        )
    return format_


def _instead(folder: Path) -> str:
    """What to name in place of ``folder``, where a run wrote it."""
    export = folder / "export"
    if (folder / ADAPTERS).exists() or (export / ADAPTERS).exists():
        run = folder if (export / ADAPTERS).exists() else "RUN"
        return (
            f" It holds adapters, which are no model without their base: `panda export {run} --merge` writes the two"
            " as one, to RUN/merged; name that."
        )
    if (export / CONFIG).exists():
        return f" It is a run; name its export, {export}."
    if (folder / "provenance.json").exists():
        return f" It is a run without an export: `panda export {folder}` writes one, to RUN/export; name that."
    return ""


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise UserError(f"{file}: not valid JSON: {problem}.") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{file}: it has no 'model_type', so it is not the configuration of a transformers model.")
    return config


def _safetensors(folder: Path) -> Weights:
    from panda.models.weight_files import safetensors_weights

    return safetensors_weights(folder)


def _pickles(folder: Path) -> Weights:
    from panda.models.weight_files import pickled_weights

    return pickled_weights(folder)


META = Format("Meta's original format", SHARDS, Kind(SHARDS), meta_config, meta_weights, is_pickle=True)
FORMATS = (
    Format("safetensors", "*.safetensors*", SAFETENSORS, _read_config, _safetensors, is_pickle=False),
    Format("pickles", "*.bin*", PICKLES, _read_config, _pickles, is_pickle=True),
    META,
)
"""In the order in which a folder that has several is taken."""
