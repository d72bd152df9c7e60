"""The command line and the YAML file, as given values with their origins.

Which flags exist depends on the components that the flags choose, so the line is parsed here without
knowing any: ``--key value``, ``--key=value``, ``--key a b`` for a list, and ``--key`` for true.
"""

from __future__ import annotations

import numbers
import os
import sys
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from pathlib import Path
from typing import Any

from panda.configuration.spellings import ACCEPTED_SPELLINGS
from panda.configuration.translation.translate import is_of_another_tool
from panda.configuration.translation.translate import looks_like
from panda.registry import UserError
from panda.registry.api import checked_api
from panda.registry.choosing import BLOCK
from panda.registry.flat_yaml import load_flat_yaml
from panda.registry.location import path_in_package
from panda.registry.location import problem_of_path
from panda.registry.location import resolve_path
from panda.registry.options import Given
from panda.weights.run_folders import CHECKPOINTS
from panda.weights.run_folders import PROVENANCE
from panda.weights.run_folders import RUN_CONFIG

IGNORED = ("local_rank",)
"""Flags that launchers add: `deepspeed` passes --local_rank, which panda reads from the environment."""


API = "api"
"""The entry of a configuration that states the version of panda's API for which it was written."""

RECORDED_BY = "recorded_by"
"""The entry of a run's config.yaml that states the version of panda which wrote it. Files of the user that such a file
names are executed only where the command line names them, too."""


@dataclass(frozen=True)
class Arguments:
    """A command line and the YAML file that it names, parsed; or what ``panda.train`` was given."""

    given: dict[str, Given]
    """Keys of the YAML file, overridden by the flags."""
    help: bool
    api: int | None = None
    """The version of panda's API for which the file was written; None where it states none."""
    recorded: dict[str, Given] = field(default_factory=dict)
    """Of the keys, those of a file that a run wrote, where no flag overrides them."""
    changed: frozenset[str] = frozenset()
    """The keys that flags give, or add to (`-p`, `--profile`)."""
    in_process: bool = False
    """Whether components that this process has registered are among those that can be named."""

    @property
    def blocked(self) -> tuple[str, ...]:
        """NAME of each ``no:NAME`` in ``plugins``."""
        return tuple(blocked_name(text) for text in texts_of(self.given.get("plugins")) if text.startswith(BLOCK))


@dataclass(frozen=True)
class _File:
    """A configuration file, read."""

    given: dict[str, Given]
    api: int | None
    is_recorded: bool


def arguments_of_run(run: Path, argv: list[str]) -> Arguments:
    """The configuration that ``run``, a run directory, recorded, overridden by the flags in ``argv``.

    Files of the user in it are executed only where ``argv`` names them, too, whatever the file says of its origin.
    """
    return parse_arguments(argv, run)


def parse_arguments(argv: list[str], run: Path | None = None) -> Arguments:
    """Read the flags in ``argv`` and the YAML file that ``--config`` names, or else that of the run they continue.

    With ``run``, a run directory, its configuration is read (see ``arguments_of_run``), and there is no ``--config``.
    """
    added: list[str] = []
    blocked: list[str] = []
    flags: dict[str, Given] = {}
    asks_for_help = False
    for flag, values in words_of_flags(argv):
        if flag in ("-h", "--help"):
            asks_for_help = True
        elif flag == "--profile":
            added.append("profile")
        elif flag == "-p":
            blocked.append(blocked_name(values[0]))
        else:
            key = flag[2:].replace("-", "_")
            if key in flags:
                raise UserError(f"{flag} is given twice.")
            if key not in IGNORED:
                flags[key] = Given(_value(values), flag, " ".join(values))
    flags = _with_accepted_spellings(flags)
    config = flags.pop("config", None)
    if config is not None and not isinstance(config.value, str):
        more = f", and only one, not {config.text!r}" if isinstance(config.value, tuple) else ""
        raise UserError(f"--config needs the path of a YAML file, as in --config run.yaml{more}.")
    if config and run:
        raise UserError(f"{config.origin}: the configuration is that of the run {str(run)!r}. Leave --config out.")
    file = _recorded(run) if run else _named(str(config.value), config.origin) if config else _of_continued_run(flags)
    given = file.given | flags
    path = str(run / RUN_CONFIG) if run else str(config.value) if config else None
    if path and "resume" in given and given["resume"].value == "auto" and not {"output_dir", "run_name"} & {*flags}:
        given |= _own_directory(path)
    named = given.get("plugins")
    # `--profile` and `-p no:NAME` are short for one more item of `plugins`, beside the file's
    if (added or blocked) and not (named and named.is_nested):
        written = texts_of(named)
        short = dict.fromkeys([*added, *(BLOCK + name for name in blocked)])
        items = (*written, *(item for item in short if item not in written))  # a run's own config.yaml has them, too
        given["plugins"] = Given(items, named.origin if named else "--profile" if added else "-p", ", ".join(items))
    recorded = {key: value for key, value in file.given.items() if key not in flags} if file.is_recorded else {}
    changed = {*flags, *(["plugins"] if added or blocked else [])}
    return Arguments(given, asks_for_help, file.api, recorded, frozenset(changed))


def words_of_flags(argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag in ``argv`` as it is written, and the words of its value. Raises UserError for what is no flag."""
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if word in ("-h", "--help", "--profile"):
            yield word, []
        elif word == "-p" or word.startswith("-p="):
            yield "-p", [word[3:] if word != "-p" else argv[position] if position < len(argv) else ""]
            position += word == "-p"
        elif word.startswith("--"):
            name, equals, text = word.partition("=")
            if name == "--":
                raise UserError(f"{word!r}: expected a flag, --key value.")
            values = [text] if equals else []
            while not equals and position < len(argv) and not _is_flag(argv[position]):
                values.append(argv[position])
                position += 1
            yield name, values
        else:
            hint = f" Did you mean `--config {word}`?" if word.endswith((".yaml", ".yml")) else ""
            raise UserError(f"{word!r}: expected a flag, --key value.{hint}")


def arguments_of(config: str | os.PathLike[str] | Mapping[str, Any] | None, flags: Mapping[str, Any]) -> Arguments:
    """What ``panda.train`` is given, as if it were a file and flags. Raises UserError."""
    if isinstance(config, Mapping):
        file = _checked(
            _with_accepted_spellings({str(key): _of_python(f"config[{key!r}]", value) for key, value in config.items()})
        )
    elif isinstance(config, str | os.PathLike):
        file = _named(os.fspath(config), "panda.train: its first argument")
    elif config is not None:
        raise UserError(
            f"panda.train: its first argument is the path of a YAML file, a mapping of keys to values, or None, not"
            f" {type(config).__qualname__}."
        )
    over = _with_accepted_spellings({key: _of_python(f"panda.train({key}=...)", value) for key, value in flags.items()})
    if config is None:
        file = _of_continued_run(over)
    recorded = {key: value for key, value in file.given.items() if key not in over} if file.is_recorded else {}
    return Arguments(file.given | over, False, file.api, recorded, frozenset(over), in_process=True)


def _named(text: str, origin: str) -> _File:
    """The configuration file that ``text`` names. Raises UserError."""
    if problem := problem_of_path(text):
        raise UserError(f"{origin}: {text[:200]!r} is not the path of a YAML file. {problem}")
    return _read(resolve_path(text), text if path_in_package(text) else None)


def _of_python(origin: str, value: Any) -> Given:
    """``value``, a Python object, as a given value. Raises UserError where it is none that a file could have."""
    if isinstance(value, Mapping):
        return Given(True, origin, "...", is_nested=True)
    items = tuple(_plain(item) for item in (value if isinstance(value, list | tuple) else [value]))
    for item in items:
        if item is not None and not isinstance(item, str | int | float):
            raise UserError(
                f"{origin}: expected a text, a number, a truth value, None or a list of these, not a"
                f" {type(item).__qualname__}."
            )
    return Given(items if isinstance(value, list | tuple) else items[0], origin, ", ".join(map(str, items)))


def _plain(item: Any) -> Any:
    """``item`` as a value of YAML, where it is a path or a number of some library."""
    if isinstance(item, os.PathLike):
        return os.fspath(item)
    if isinstance(item, numbers.Integral) and not isinstance(item, bool):
        return int(item)
    return float(item) if isinstance(item, numbers.Real) and not isinstance(item, bool) else item


def _read(path: Path, name: str | None = None) -> _File:
    """The configuration file at ``path``, which messages call ``name``. Raises UserError if it is none of panda's."""
    if tool := looks_like(path):
        raise UserError(
            f"{path}: looks like a file of {tool}, and panda's keys are others. `panda translate {path} --output"
            " run.yaml` writes it in panda's keys, and lists what has no counterpart."
        )
    return _checked(_with_accepted_spellings(load_flat_yaml(path, is_of_another_tool, name)))


def _own_directory(config: str) -> dict[str, Given]:
    """The run directory of ``config``, if that is the config.yaml of a run: which `resume: auto` then continues."""
    folder = resolve_path(config).parent
    if resolve_path(config).name != RUN_CONFIG or not (folder / PROVENANCE).is_file():
        return {}
    return {"output_dir": Given(str(folder), f"the run of {config}", str(folder))}


def _recorded(run: Path) -> _File:
    """The config.yaml of ``run``, a run directory. Raises UserError if it is none of panda's."""
    # Whoever wrote it, the user has not named this file: files in it are executed only where flags name them.
    return replace(_read(run / RUN_CONFIG), is_recorded=True)


def _of_continued_run(flags: Mapping[str, Given]) -> _File:
    """The config.yaml of the run that ``flags`` continue, where they name no model themselves; else an empty one."""
    place = flags.get("resume")
    if place is not None and place.value == "auto":
        place = flags.get("output_dir")
    if place is None or not isinstance(place.value, str) or any(key in flags for key in ("arch", "model", "ckpt_path")):
        return _File({}, None, False)
    path = resolve_path(place.value).absolute()
    folders = [path]
    folders += [path.parent] if path.name == CHECKPOINTS else []
    folders += [path.parents[1]] if path.parent.name == CHECKPOINTS else []
    for folder in folders:
        if (folder / RUN_CONFIG).is_file():
            return _recorded(folder)
    if flags["resume"].value != "auto":
        raise UserError(
            f"{flags['resume'].origin}: no run at {place.value[:200]!r}: no {RUN_CONFIG} in it. Name a run directory,"
            " its `checkpoints`, or one `step-...` folder."
        )
    return _File({}, None, False)


def _checked(given: dict[str, Given]) -> _File:
    """A file that holds ``given``. Raises UserError for what only a command line can have."""
    if "config" in given:
        raise UserError(f"{given['config'].origin}: a configuration file cannot name another one.")
    stated = given.pop(API, None)
    api = checked_api(str(stated.value), f"{stated.origin}: {API}") if stated else None
    return _File(given, api, given.pop(RECORDED_BY, None) is not None)


def texts_of(given: Given | None) -> tuple[str, ...]:
    """Those items of a list that are texts."""
    values = () if given is None else given.value if isinstance(given.value, tuple) else (given.value,)
    return tuple(value for value in values if isinstance(value, str))


def blocked_name(text: str) -> str:
    """NAME of ``-p no:NAME``. Raises UserError for anything else after ``-p``."""
    if not text.startswith(BLOCK) or text == BLOCK:
        raise UserError(f"-p {text}: expected `-p no:NAME`. To add a plugin, write `--plugins NAME`.")
    return text.removeprefix(BLOCK)


def _is_flag(word: str) -> bool:
    return word.startswith(("--", "-p=")) or word in ("-p", "-h")


def _value(words: list[str]) -> str | bool | tuple[str | bool | None, ...]:
    if not words:
        return True
    return words[0] if len(words) == 1 else tuple(words)


def _with_accepted_spellings(given: dict[str, Given]) -> dict[str, Given]:
    accepted: dict[str, Given] = {}
    for written, value in given.items():
        key = ACCEPTED_SPELLINGS.get(written, written)
        if key != written:
            print(f"warning: {value.origin}: {written!r} is taken as {key!r}.", file=sys.stderr)
        if key in accepted:
            raise UserError(f"{value.origin}: {key!r} is given twice, first at {accepted[key].origin}.")
        accepted[key] = value
    return accepted
