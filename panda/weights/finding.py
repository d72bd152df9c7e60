"""Where a checkpoint is: a folder, one in ./pretrained-models, or the hub; with its base where it is a delta."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from panda.registry import UserError
from panda.registry.location import problem_of_path
from panda.registry.location import resolve_path
from panda.weights.adapters import base_of_adapters
from panda.weights.adapters import is_adapters
from panda.weights.delta import check_base
from panda.weights.delta import is_delta
from panda.weights.formats import format_among
from panda.weights.formats import format_of
from panda.weights.hub import Repository
from panda.weights.hub import cached
from panda.weights.hub import is_name
from panda.weights.hub import repository_of
from panda.weights.pretrained import Pretrained
from panda.weights.run_folders import exported_model
from panda.weights.shards import ADAPTER_WEIGHTS
from panda.weights.shards import index_of
from panda.weights.shards import shard_names
from panda.weights.tokenizers import has_tokenizer

SHELF = Path("pretrained-models")
"""Where PandaLLM's documentation has users put their checkpoints."""

_FROM_CACHE = "Hugging Face hub, from its cache"


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is to be found, and what may be read there."""

    location: str
    """A folder, the name of one in ``pretrained-models``, or a name on the hub; looked for in that order."""
    option: str
    """The option that gave ``location``, for messages."""
    base_path: str | None = None
    """The location of the base, where the checkpoint is a delta."""
    allow_pickle: bool = False
    """Whether weights may be read from pickles."""
    quantised: bool = False
    """Whether its weights may be quantised: such a checkpoint can answer, and cannot be trained."""


class NamesCheckpoint(Protocol):
    """Options that name a checkpoint, such as those of a run."""

    @property
    def ckpt_path(self) -> str | None: ...
    @property
    def base_path(self) -> str | None: ...
    @property
    def allow_pickle(self) -> bool: ...


def find_pretrained(options: NamesCheckpoint) -> Pretrained | None:
    """The checkpoint that ``options`` name, with its base where it is a delta; None where they name none."""
    if options.ckpt_path is None:
        return None
    return checkpoint_at(Source(options.ckpt_path, "ckpt_path", options.base_path, options.allow_pickle))


def checkpoint_at(source: Source) -> Pretrained:
    """The checkpoint at ``source``: a model, a delta with its base, or adapters with theirs."""
    folder, _, _, repository = _locate(source)
    if not is_adapters(folder, _present(folder, repository)):
        return whole_at(source)
    if repository:
        repository.fetch([name for name in repository.files if fnmatch(name, ADAPTER_WEIGHTS)])
    location, option = _base_location(folder, source.base_path)
    return replace(whole_at(Source(location, option, allow_pickle=source.allow_pickle)), adapters=folder)


def base_location(ckpt_path: str, base_path: str | None) -> str:
    """Where the base of new adapters is, in a form that means the same in every working directory.

    It is at ``ckpt_path``, or it is the base of the adapters there.
    """
    here = find_here(ckpt_path) or cached(ckpt_path)
    if here and is_adapters(here, _present(here, None)):
        return from_anywhere(_base_location(here, base_path)[0])
    return from_anywhere(ckpt_path)


def _base_location(adapters: Path, base_path: str | None) -> tuple[str, str]:
    """The location of the base of ``adapters``, and the option that gave it. Raises UserError where there is none."""
    if base_path:
        return base_path, "base_path"
    named = base_of_adapters(adapters)
    if named is None or not (find_here(named) or is_name(named)):
        said = f"name {named!r}, which is not a folder here" if named else "do not name it"
        raise UserError(
            f"ckpt_path: {adapters} holds adapters whose base was not found: they {said}. Name the folder of the"
            " weights that they were trained on with `base_path`."
        )
    return named, f"ckpt_path: the base that {adapters} names, which `base_path` overrides"


def _present(folder: Path, repository: Repository | None) -> tuple[str, ...]:
    """Names of the files in ``folder``, or that can be fetched to it."""
    return repository.files if repository else tuple(file.name for file in folder.iterdir() if file.is_file())


def whole_at(source: Source) -> Pretrained:
    """The checkpoint at ``source``, with its base where it is a delta.

    Raises UserError for a delta without a ``base_path``, and for anything else with one.
    """
    pretrained = pretrained_at(source)
    if not is_delta(pretrained.folder, source.location):
        if source.base_path is not None:
            raise UserError(
                f"base_path: {source.location!r} is neither a delta nor adapters, so it has no base. Leave base_path"
                " out; the name of a delta ends in `-delta`."
            )
        return pretrained
    if source.base_path is None:
        raise UserError(
            f"{source.option}: {source.location!r} is a delta: the difference to the weights that it was trained from,"
            " not a model by itself. Name those weights with `base_path`, and panda adds the two while it loads;"
            " `panda delta apply` writes the sum to a folder."
        )
    return added_to(pretrained, Source(source.base_path, "base_path", allow_pickle=source.allow_pickle))


def added_to(delta: Pretrained, source: Source) -> Pretrained:
    """``delta`` with the base at ``source``. Raises UserError where that cannot be its base."""
    base = pretrained_at(source)
    if is_delta(base.folder, source.location):
        raise UserError(f"{source.option}: {source.location!r} is a delta itself. Name the whole model.")
    check_base(delta, base)
    return replace(delta, base=base)


def pretrained_at(source: Source) -> Pretrained:
    """The checkpoint at ``source``, a delta without its base. Raises UserError where there is none that may be read."""
    folder, found, name, repository = _locate(source)
    present = _present(folder, repository)
    is_adapters(folder, present)  # refuses a model beside adapters
    format_ = format_of(folder, present, source.option)
    if format_.is_pickle and not source.allow_pickle:
        raise UserError(
            f"{source.option}: {folder} holds its weights in pickles ({format_.files}), and loading a pickle can run"
            " code that is in it. If you trust its origin, add `--allow_pickle`; panda then loads it with torch's"
            " `weights_only`, which accepts only tensors."
        )
    config = format_.config(folder)
    if "quantization_config" in config and not source.quantised:
        how = config["quantization_config"]
        method = how.get("quant_method", "unknown") if isinstance(how, dict) else how
        raise UserError(
            f"{source.option}: the weights in {folder} are quantised ({method}), and cannot be trained. Name the"
            " checkpoint that they were made from."
        )
    return Pretrained(folder, found, format_, config, None, repository, name)


def find_here(location: str) -> Path | None:
    """The folder at ``location``, or of that name in ``pretrained-models``; the hub is not asked.

    Of a run directory, its export.
    """
    if problem_of_path(location):
        return None
    path = resolve_path(location)
    shelved = SHELF / location
    if path.is_dir():
        return exported_model(path)
    return exported_model(shelved) if len(path.parts) == 1 and shelved.is_dir() else None


def from_anywhere(location: str) -> str:
    """``location`` in a form that means the same in every working directory; a name on the hub stays one."""
    folder = find_here(location)
    return str(folder.absolute()) if folder else location


def _locate(source: Source) -> tuple[Path, str, str | None, Repository | None]:
    """The folder, where it was found, its name on the hub, and the repository to fetch its weights from."""
    location, option = source.location, source.option
    path = resolve_path(location)
    shelved = SHELF / location
    if here := find_here(location):
        found = f"in ./{SHELF}" if not path.is_dir() else "a folder" if here == path else "the export of a run"
        return here, found, None, None
    looked = [f"the folder {path.absolute()}"]
    if len(path.parts) == 1:
        looked.append(f"the folder {shelved.absolute()}")
    if path.exists():
        raise UserError(f"{option}: {location!r} is a file. Name the folder that it is in.")
    name = location if is_name(location) else None
    if name or len(path.parts) == 1:
        snapshot = cached(location)
        has_weights = snapshot is not None and _has_weights(location, snapshot, source.allow_pickle)
        if snapshot and (name is None or (has_weights and has_tokenizer(snapshot)) or _has_adapters(snapshot)):
            return snapshot, _FROM_CACHE, name, None
        looked.append(
            f"{location} in the cache of the Hugging Face hub{', which has only a part of it' * bool(snapshot)}"
        )
    if name:  # a name without an owner is that of a few old models, and more often that of a misspelt folder
        try:
            repository = repository_of(name)
        except UserError as problem:
            if snapshot and _has_weights(name, snapshot, allow_pickle=True):
                return snapshot, _FROM_CACHE, name, None
            raise UserError(
                f"{option}: {location!r} was not found on this machine: looked for {'; '.join(looked)}. And {problem}"
            ) from None
        return repository.folder, "Hugging Face hub", name, repository
    raise UserError(f"{option}: {location!r} was not found. Looked for " + "; ".join(looked) + ".")


def _has_adapters(snapshot: Path) -> bool:
    return is_adapters(snapshot, _present(snapshot, None))


def _has_weights(name: str, snapshot: Path, allow_pickle: bool) -> bool:
    """Whether ``snapshot``, of the model ``name``, has all its files of weights, in a format that may be read."""
    present = {file.name for file in snapshot.iterdir() if file.is_file()}
    format_ = format_among(present)
    if format_ is None or (format_.is_pickle and not allow_pickle):
        return False
    names = format_.file_names
    if names.single in present or index_of(snapshot, names):
        return present.issuperset(shard_names(snapshot, names, present))
    return cached(name, [names.pattern]) is not None  # nothing in the snapshot says how many files there are
