"""Which files of a data set belong to which of its configurations and splits, as the library `datasets` says.

It is asked of a folder: of one in the layout of the hub, or of one of empty files that have the names of those on the
hub. So it fetches nothing, converts nothing, and panda's own readers read the files.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING
from dataclasses import dataclass
from dataclasses import fields
from functools import partial
from pathlib import Path
from pathlib import PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from panda.registry import UserError
from panda.registry.errors import in_brief
from panda.weights.hub import CARD

_NO_MATTER = ("name", "version", "data_dir", "data_files", "description", "features", "drop_labels", "sep")
"""Fields of a configuration that say nothing of how a file is read, and `sep`, which follows from the ending or is
found where it does not."""


@dataclass(frozen=True)
class Split:
    """Files of a data set, by their paths in its folder."""

    configuration: str
    name: str
    files: tuple[str, ...]
    configurations: tuple[str, ...]
    """All that the data set has."""
    splits: tuple[str, ...]
    """All that the configuration has."""
    parameters: tuple[str, ...]
    """What the card says of how files are read."""


def find_split(folder: Path, chosen: tuple[str, ...], name: str) -> Split:
    """The split of the data set in ``folder`` that is ``chosen`` by ``CONFIGURATION:SPLIT``, or one of them, or none.

    ``name``: what the user calls the data set. Raises UserError for one that it does not have, where a choice is
    needed, and where `datasets` is not installed or does not understand the folder.
    """
    datasets = _library(name)
    with _explained(name), TemporaryDirectory(prefix="panda-") as cache:
        load = partial(datasets.load_dataset_builder, str(folder), cache_dir=cache)
        try:
            builder = load()
            default = builder.config.name
            configurations = tuple(builder.builder_configs) or (default,)
        except ValueError:  # a configuration has to be named
            builder = None
            configurations = tuple(datasets.get_dataset_config_names(str(folder)))
            default = configurations[0] if len(configurations) == 1 else None

        def files_of(configuration: str) -> tuple[Any, dict[str, list[str]]]:
            config = (builder if builder and configuration == default else load(name=configuration)).config
            return config, {str(split): list(files) for split, files in config.data_files.items()}

        configuration, split = _choose(chosen, configurations, default, name)
        if split is None and default not in (None, configuration) and configuration in files_of(default)[1]:
            raise UserError(
                f"{name}:{configuration}: there is a configuration of that name, and a split of {default}. Write"
                f" {name}:{configuration}:SPLIT or {name}:{default}:{configuration}."
            )
        config, splits = files_of(configuration)
        split = chosen_split(split, tuple(splits), f"{name}:{configuration}")
        root = folder.resolve()
        files = tuple(_within(root, file, name) for file in splits[split])
        return Split(configuration, split, files, configurations, tuple(splits), tuple(_parameters(config)))


TRAIN = "train"
"""The split that is taken where none is named."""


def chosen_split(split: str | None, splits: tuple[str, ...], name: str) -> str:
    """``split``, by default the one to train on. Raises UserError if it is not among ``splits``, those of ``name``."""
    chosen = split or TRAIN
    if chosen not in splits:
        example = splits[0] if splits else TRAIN
        raise UserError(f"{name} has no split {chosen!r}; it has {' and '.join(splits)}. Name one: {name}:{example}")
    return chosen


def _choose(
    chosen: tuple[str, ...], configurations: tuple[str, ...], default: str | None, name: str
) -> tuple[str, str | None]:
    """The configuration and the split that are ``chosen``; None for a split that is not named."""
    there = f"it has {', '.join(configurations)}"
    if len(chosen) == 2:
        if chosen[0] not in configurations:
            raise UserError(f"{name} has no configuration {chosen[0]!r}; {there}.")
        return chosen[0], chosen[1]
    if chosen and chosen[0] in configurations:
        return chosen[0], None
    if default is None:
        said = f"{chosen[0]!r} is none of them" if chosen else "none is named"
        raise UserError(f"{name} has several configurations, and {said}: {there}. Write {name}:{configurations[0]}")
    return default, chosen[0] if chosen else None


def _within(root: Path, file: str, name: str) -> str:
    """The path of ``file`` in the folder ``root``. Raises UserError for one that is not there."""
    path = Path(file)
    if "://" in file or not path.is_relative_to(root) or ".." in path.parts:
        raise UserError(f"{name}: its card names {file}, which is not in its folder. Fetch it, and name the file.")
    return path.relative_to(root).as_posix()


def _parameters(config: Any) -> Iterator[str]:
    """The fields of a configuration that its card sets, each with its value."""
    for field in fields(config):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(config, field.name)
        if field.name not in _NO_MATTER and value != default:
            yield f"{field.name} {value!r}"
    if getattr(config, "sep", ",") not in (",", "\t"):
        yield f"sep {config.sep!r}"


@contextmanager
def folder_of_names(names: tuple[str, ...], described: Path) -> Iterator[Path]:
    """A folder of empty files called ``names``, but for the files of a card, which are those of ``described``."""
    with TemporaryDirectory(prefix="panda-") as made:
        folder = Path(made)
        for name in names:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:  # from the hub, and so not to be trusted
                raise UserError(f"a file of it is called {name!r}, which is outside its folder.")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if name in CARD:
                shutil.copy(described / name, folder / path)
            else:
                (folder / path).touch()
        yield folder


def _library(name: str) -> Any:
    try:
        import datasets
    except ImportError as problem:
        raise UserError(
            f"{name}: the library `datasets` finds the files of a split, and cannot be imported ({problem})."
            " Install it: pip install 'panda-train[hub]'. Or name files."
        ) from None
    datasets.disable_progress_bars()
    return datasets


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as problem:  # the library raises many kinds
        raise UserError(
            f"{name}: the library `datasets` finds no files of splits in it: {type(problem).__name__}:"
            f" {in_brief(problem)}. Name its files or folders."
        ) from problem
