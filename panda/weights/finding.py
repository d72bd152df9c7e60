"""Where a checkpoint is: a folder, one on the shelf, or on the hub; with its base where it is a delta."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from panda.registry import UserError
from panda.weights.delta import check_base
from panda.weights.delta import is_delta
from panda.weights.formats import format_among
from panda.weights.formats import format_of
from panda.weights.hub import Repository
from panda.weights.hub import cached
from panda.weights.hub import described
from panda.weights.hub import is_name
from panda.weights.pretrained import Pretrained
from panda.weights.shards import index_of
from panda.weights.shards import shard_names
from panda.weights.tokenizers import has_tokenizer

if TYPE_CHECKING:
    from panda.configuration.options import RunOptions

SHELF = Path("pretrained-models")
"""Where PandaLLM's documentation has users put their checkpoints."""

_FROM_CACHE = "Hugging Face hub, from its cache"


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


def pretrained_at(location: str, *, option: str, allow_pickle: bool = False, quantised: bool = False) -> Pretrained:
    """The checkpoint at ``location``: a folder, one in ``pretrained-models``, or a name on the hub, in that order.

    One whose weights are ``quantised`` answers, and cannot be trained. Raises UserError where there is none.
    """
    folder, found, name, repository = _locate(location, option, allow_pickle)
    names = repository.files if repository else tuple(file.name for file in folder.iterdir() if file.is_file())
    format_ = format_of(folder, names, option)
    if format_.is_pickle and not allow_pickle:
        raise UserError(
            f"{option}: {folder} holds its weights in pickles ({format_.files}), and loading one can run code that is"
            " in it. If you trust where it comes from, say `--allow_pickle`; panda then loads it with torch's"
            " `weights_only`, which takes tensors alone."
        )
    config = format_.config(folder)
    if "quantization_config" in config and not quantised:
        how = config["quantization_config"]
        method = how.get("quant_method", "unknown") if isinstance(how, dict) else how
        raise UserError(
            f"{option}: the weights in {folder} are quantised ({method}), and cannot be trained. Give the checkpoint"
            " that they were made from."
        )
    return Pretrained(folder, found, format_, config, None, repository, name)


def find_here(location: str) -> Path | None:
    """The folder that ``location`` means, itself or in ``pretrained-models``; the hub is not asked."""
    path = Path(location).expanduser()
    shelved = SHELF / location
    if path.is_dir():
        return path
    return shelved if len(path.parts) == 1 and shelved.is_dir() else None


def from_anywhere(location: str) -> str:
    """``location`` so that it means the same in every working directory; a name on the hub stays one."""
    folder = find_here(location)
    return str(folder.absolute()) if folder else location


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
        has_weights = snapshot is not None and _has_weights(location, snapshot, allow_pickle)
        if snapshot and (name is None or (has_weights and has_tokenizer(snapshot))):
            return snapshot, _FROM_CACHE, name, None
        looked.append(f"{location} in the cache of the Hugging Face hub{', which has a part of it' * bool(snapshot)}")
    if name:  # those without an owner are of a few old models, and more often a misspelt folder
        try:
            repository = described(name)
        except UserError as problem:
            if snapshot and _has_weights(name, snapshot, allow_pickle=True):
                return snapshot, _FROM_CACHE, name, None
            raise UserError(
                f"{option}: {location!r} is not here: looked for {'; '.join(looked)}. And {problem}"
            ) from None
        return repository.folder, "Hugging Face hub", name, repository
    raise UserError(f"{option}: {location!r} is nowhere. Looked for " + "; ".join(looked) + ".")


def _has_weights(name: str, snapshot: Path, allow_pickle: bool) -> bool:
    """Whether ``snapshot``, of the model ``name``, has all its files of weights, in a format that may be read."""
    there = {file.name for file in snapshot.iterdir() if file.is_file()}
    format_ = format_among(there)
    if format_ is None or (format_.is_pickle and not allow_pickle):
        return False
    kind = format_.kind
    if index_of(snapshot, kind) or kind.single in there:
        return there.issuperset(shard_names(snapshot, kind, there))
    return cached(name, [kind.pattern]) is not None  # nothing in it says how many there are
