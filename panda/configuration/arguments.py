"""The command line and the YAML file, as given values with their origins.

Which flags exist depends on the components that the flags choose, so the line is parsed here without
knowing any: ``--key value``, ``--key=value``, ``--key a b`` for a list, and ``--key`` for true.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from panda.configuration.spellings import ACCEPTED_SPELLINGS
from panda.configuration.translation.translate import is_of_another_tool
from panda.configuration.translation.translate import looks_like
from panda.registry import UserError
from panda.registry.choosing import BLOCK
from panda.registry.flat_yaml import load_flat_yaml
from panda.registry.options import Given

IGNORED = ("local_rank",)
"""Flags that launchers add: `deepspeed` passes --local_rank, which panda reads from the environment."""


@dataclass(frozen=True)
class Arguments:
    """A command line and the YAML file that it names, parsed."""

    given: dict[str, Given]
    """Keys of the YAML file, overridden by the flags."""
    help: bool

    @property
    def blocked(self) -> tuple[str, ...]:
        """NAME of each ``no:NAME`` in ``plugins``."""
        return tuple(blocked_name(text) for text in _texts(self.given.get("plugins")) if text.startswith(BLOCK))


def parse_arguments(argv: list[str]) -> Arguments:
    """Read the flags in ``argv`` and the YAML file that ``--config`` names."""
    added: list[str] = []
    blocked: list[str] = []
    flags: dict[str, Given] = {}
    asks_for_help = False
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if word in ("-h", "--help"):
            asks_for_help = True
        elif word == "--profile":
            added.append("profile")
        elif word == "-p" or word.startswith("-p="):
            blocked.append(blocked_name(word[3:] if word != "-p" else argv[position] if position < len(argv) else ""))
            position += word == "-p"
        elif word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            if not name:
                raise UserError(f"{word!r}: expected a flag, --key value.")
            values = [text] if equals else []
            while not equals and position < len(argv) and not _is_flag(argv[position]):
                values.append(argv[position])
                position += 1
            key = name.replace("-", "_")
            origin = f"--{name}"
            if key in flags:
                raise UserError(f"{origin} is given twice.")
            if key not in IGNORED:
                flags[key] = Given(_value(values), origin, " ".join(values))
        else:
            hint = f" Did you mean `--config {word}`?" if word.endswith((".yaml", ".yml")) else ""
            raise UserError(f"{word!r}: expected a flag, --key value.{hint}")
    flags = _with_accepted_spellings(flags)

    given: dict[str, Given] = {}
    config = flags.pop("config", None)
    if config is not None:
        if not isinstance(config.value, str):
            more = f", and only one, not {config.text!r}" if isinstance(config.value, tuple) else ""
            raise UserError(f"--config needs the path of a YAML file, as in --config configs/instruct-tiny.yaml{more}.")
        if tool := looks_like(Path(config.value)):
            raise UserError(
                f"{config.value}: looks like a file of {tool}, and panda's keys are others."
                f" `panda translate {config.value} --output run.yaml` writes it in panda's keys, and lists what has no"
                " counterpart."
            )
        given = _with_accepted_spellings(load_flat_yaml(Path(config.value), is_of_another_tool))
        if "config" in given:
            raise UserError(f"{given['config'].origin}: a configuration file cannot name another one.")
    given |= flags
    named = given.get("plugins")
    # `--profile` and `-p no:NAME` are short for one more item of `plugins`, beside the file's
    if (added or blocked) and not (named and named.is_nested):
        items = (*_texts(named), *added, *(BLOCK + name for name in blocked))
        given["plugins"] = Given(items, named.origin if named else "--profile" if added else "-p", ", ".join(items))
    return Arguments(given, asks_for_help)


def _texts(given: Given | None) -> tuple[str, ...]:
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
