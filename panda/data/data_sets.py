"""Data sets as the library `datasets` knows them: by a name on the Hugging Face hub, or a copy of one in a folder.

    OWNER/NAME, OWNER/NAME:SPLIT, OWNER/NAME:CONFIGURATION, OWNER/NAME:CONFIGURATION:SPLIT, each perhaps with @REVISION
    FOLDER, and the same with a choice; a path that exists is that path

A name is settled once, at the start: the hub says which commit it is now, and `settled` gives the text that always
means the same files, with configuration, split and commit. Only such a text has files.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from panda.data.saved_splits import is_saved
from panda.data.saved_splits import saved_splits
from panda.data.splits import Split
from panda.data.splits import chosen_split
from panda.data.splits import find_split
from panda.data.splits import folder_of_names
from panda.files.terminal import number_of
from panda.registry import UserError
from panda.registry.location import resolve_path
from panda.weights.hub import Repository
from panda.weights.hub import data_repository
from panda.weights.hub import is_commit
from panda.weights.hub import is_data_name

_NAME = r"(?P<name>\w[\w.-]*/\w[\w.-]*)"
_CHOICE = r"(?P<choice>(:[^:@/]+){0,2})"
_ON_HUB = re.compile(rf"{_NAME}{_CHOICE}(@(?P<revision>\w[\w./-]*))?")
_IN_FOLDER = re.compile(rf"(?P<name>.+?){_CHOICE}")
_PART = re.compile(rf"{_NAME}:[^@\[]+\[.*\].*")
"""As `datasets` writes parts of a split: ``train[:10%]``."""
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\D.*)?")


@dataclass(frozen=True)
class DataSet:
    """The files of one split of a data set."""

    location: str
    """The text that means these files."""
    name: str
    """On the hub, or the folder."""
    configuration: str | None
    split: str | None
    revision: str | None
    """The commit; None for a folder that does not say it."""
    files: tuple[Path, ...]
    configurations: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    """All that there are."""
    parameters: tuple[str, ...] = ()
    """What its card says of how files are read, and panda does not follow."""

    def describe(self) -> str:
        """What was found, on one line."""
        parts = [_of("configuration", self.configuration, self.configurations), _of("split", self.split, self.splits)]
        parts.append(f"revision {self.revision}" if self.revision else "")
        parts.append(number_of(len(self.files), "file"))
        if self.parameters:
            parts.append(f"its card says {', '.join(self.parameters)}, which is not followed")
        return f"{self.name}: {', '.join(part for part in parts if part)}"

    def record(self) -> dict[str, Any]:
        """Plain objects for provenance.json."""
        files = [str(file) for file in self.files]
        named = {key: getattr(self, key) for key in ("location", "name", "configuration", "split", "revision")}
        return named | {"files": files}


def _of(what: str, chosen: str | None, there: tuple[str, ...]) -> str:
    others = [each for each in there if each != chosen]
    left_out = f" (and not {', '.join(others[:5])}{', ...' * (len(others) > 5)})" if others else ""
    return f"{what} {chosen}{left_out}" if chosen else ""


def settled(location: str, revision: str | None = None) -> str:
    """``location`` as a text that means the same files later; one that names no data set as it is.

    The hub is asked which commit a name means, unless ``revision`` says so. Raises UserError where the data set, the
    configuration or the split does not exist, and where one of several has to be chosen.
    """
    found = _named(location)
    if found is None:
        data_set = data_set_at(location)
        return data_set.location if data_set else location
    name, chosen, given = found
    try:
        repository = data_repository(name, given or revision)
    except UserError as problem:
        missing = f"{location!r} does not exist (looked in {Path.cwd()}), and on the hub: "
        raise UserError(f"{'' if given or chosen else missing}{problem}") from None
    split, commit = _split_on_hub(name, repository, chosen), repository.folder.name
    if repository.not_asked:
        _note_once(
            f"{name}: {commit} is the revision that the local cache has for {given or 'main'}: {repository.not_asked}"
        )
    return f"{name}:{split.configuration}:{split.name}@{commit}"


@cache
def _note_once(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr, flush=True)


def unsettled_name(location: str) -> str | None:
    """The name on the hub that ``location`` is, if it is one without a revision."""
    found = _named(location)
    return found[0] if found and found[2] is None else None


def name_and_commit(location: str) -> tuple[str, str] | None:
    """The name and the commit that ``location`` has; None for one that is not settled."""
    found = _ON_HUB.fullmatch(location)
    return (found["name"], found["revision"]) if found and is_commit(found["revision"]) else None


def data_set_at(location: str) -> DataSet | None:
    """The data set at ``location``, which is settled or in a folder; None where it is files, or a folder of these.

    Fetches files of the hub that the local cache lacks. Raises UserError where that fails.
    """
    if name_and_commit(location):
        return _data_set_on_hub(location)
    found = _in_folder(location)
    return _data_set_in(*found) if found else None


def _named(location: str) -> tuple[str, tuple[str, ...], str | None] | None:
    """Name, choice and revision, where ``location`` is a name on the hub; None where it is a path."""
    if _PART.fullmatch(location) and not os.path.lexists(resolve_path(location)):
        raise UserError(
            f"{location}: a part of a split cannot be named. `max_samples` uses its first samples, `eval_fraction`"
            " holds a part of them out, and the weight of a path shows a part of them in each epoch."
        )
    found = _ON_HUB.fullmatch(location)
    if found is None or (location == found["name"] and not is_data_name(location)):
        return None
    if found["revision"] is None and (os.path.lexists(resolve_path(location)) or _in_folder(location)):
        return None
    return found["name"], _parts(found["choice"]), found["revision"]


def _parts(choice: str) -> tuple[str, ...]:
    return tuple(choice.split(":")[1:])


# -- on the hub ---------------------------------------------------------------------------------


@cache
def _split_on_hub(name: str, repository: Repository, chosen: tuple[str, ...]) -> Split:
    script = f"{name.partition('/')[2]}.py"
    if script in repository.files:
        raise UserError(
            f"{name} is made by a program of its repository, {script}, and panda runs no code of data sets. The hub may"
            f" have its rows as files: `hf download {name} --repo-type dataset --revision refs/convert/parquet"
            " --local-dir FOLDER`; name the folder of a configuration and a split in it."
        )
    with folder_of_names(repository.files, repository.folder) as folder:
        try:
            return find_split(folder, chosen, name)
        except UserError as problem:
            if repository.is_listed:
                raise
            raise UserError(
                f"{problem} The local cache may have only a part of it, and the hub was not asked."
            ) from None


@cache
def _data_set_on_hub(location: str) -> DataSet:
    found = _ON_HUB.fullmatch(location)
    assert found is not None
    repository = data_repository(found["name"], found["revision"])
    split = _split_on_hub(found["name"], repository, _parts(found["choice"]))
    _refuse_missing_shards(found["name"], split.files)
    repository.fetch(split.files)
    return DataSet(
        location,
        found["name"],
        split.configuration,
        split.name,
        repository.folder.name,
        tuple(repository.folder / file for file in split.files),
        split.configurations,
        split.splits,
        split.parameters,
    )


def _refuse_missing_shards(name: str, files: tuple[str, ...]) -> None:
    """Raise UserError where numbered files are not all there: the local cache has a part of a data set."""
    found: dict[tuple[str, str, str], int] = {}
    for file in files:
        if shard := _SHARD.fullmatch(file):
            key = (shard[1], shard[3], shard[4] or "")
            found[key] = found.get(key, 0) + 1
    for (beginning, count, ending), there in found.items():
        if there < int(count):
            raise UserError(f"{name}: {there} of the {int(count)} files {beginning}-*-of-{count}{ending} are there.")


# -- in a folder --------------------------------------------------------------------------------


def _in_folder(location: str) -> tuple[str, tuple[str, ...]] | None:
    """The folder of a data set that ``location`` names, as it is written, and the choice; None where it names none."""
    path = resolve_path(location)
    if os.path.lexists(path):
        return (location, ()) if is_data_set(path) else None
    found = _IN_FOLDER.fullmatch(location)
    if found is None or not os.path.isdir(resolve_path(found["name"])):
        return None
    return found["name"], _parts(found["choice"])


def is_data_set(folder: Path) -> bool:
    """Whether ``folder`` is one data set: written by `datasets`, or with a card that describes its splits."""
    return saved_splits(folder) is not None or _has_card(folder)


def _has_card(folder: Path) -> bool:
    """Whether the README in ``folder`` begins with metadata that describe configurations or splits."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as readme:
            if readme.readline().strip() != "---":
                return False
            metadata = takewhile(lambda line: line.strip() != "---", readme)
            return any(line.startswith(("configs:", "dataset_info:")) for line in metadata)
    except OSError:
        return False


def _data_set_in(name: str, chosen: tuple[str, ...]) -> DataSet:
    folder = resolve_path(name)
    saved = saved_splits(folder)
    if saved is None:
        split = _split_in(folder.absolute(), chosen, name)
        location = f"{name}:{split.configuration}:{split.name}"
        files = tuple(folder / file for file in split.files)
        more = split.configurations, split.splits, split.parameters
        return DataSet(location, name, split.configuration, split.name, _revision_of(folder), files, *more)
    if len(chosen) > 1:
        raise UserError(f"{':'.join([name, *chosen])}: {name} has splits, and no configurations.")
    alone = next(iter(saved)) if is_saved(folder) else None
    split_name = chosen_split(chosen[0] if chosen else alone, tuple(saved), name)
    location = name if alone else f"{name}:{split_name}"
    return DataSet(
        location, name, None, split_name, _revision_of(folder), tuple(saved[split_name]), splits=tuple(saved)
    )


@cache
def _split_in(folder: Path, chosen: tuple[str, ...], name: str) -> Split:
    return find_split(folder, chosen, name)


def _revision_of(folder: Path) -> str | None:
    """The commit that a folder of the hub's cache, or one that `hf download --local-dir` made, is a copy of."""
    if is_commit(folder.resolve().name):
        return folder.resolve().name
    noted = folder / ".cache" / "huggingface" / "download"
    commits = set()
    for file in noted.rglob("*.metadata"):
        with file.open(encoding="utf-8", errors="replace") as metadata:
            commits.add(metadata.readline().strip())
    commit = commits.pop() if len(commits) == 1 else None
    return commit if is_commit(commit) else None
