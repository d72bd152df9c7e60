"""The grid of values that ``panda sweep`` trains: what its command line asks for, as runs."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from panda.cli.parser import in_short
from panda.configuration.arguments import words_of_flags
from panda.registry import UserError
from panda.registry.location import resolve_path

OWN = ("output_dir", "run_name", "resume", "launch", "print", "dry_run", "config", "conf_path")
"""Flags that are not varied."""
LONGEST = 40
"""Characters of a value in the name of a folder."""


@dataclass(frozen=True)
class Point:
    """A combination of values, which is a run."""

    name: str
    """By what differs: of its folder, where a hash stands for a part of a value that no folder could be called."""
    directory: Path
    argv: list[str]
    """Of panda-train."""
    title: str = ""
    """What differs, as it was written, for messages."""


@dataclass(frozen=True)
class Sweep:
    """What a command line asks for."""

    folder: Path
    points: list[Point]
    launch: list[str]
    only_prints: bool


def read_command(argv: Sequence[str], usage: str) -> Sweep:
    """What the words ``argv`` ask for. Raises UserError."""
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    own: dict[str, str] = {}
    shared: list[str] = []
    varied: dict[str, list[tuple[str, list[str]]]] = {}
    given = [[flag, *words] for flag, words in words_of_flags(list(argv))]
    for flag, *words in given:
        key = flag.lstrip("-").replace("-", "_")
        if key in OWN:
            if key in ("run_name", "resume"):
                raise UserError(f"{flag}: a sweep names its runs and resumes them itself. Leave it out.")
            own["config" if key == "conf_path" else key] = " ".join(words)
        elif len(values := [words] if len(words) != 1 or not flag.startswith("--") else split_values(words[0])) == 1:
            shared += [flag, *values[0]]
        else:
            varied[flag] = [(name_of(value), value) for value in values]
            _check_different(flag, [value for _, value in varied[flag]])
    if not own.get("config"):
        raise UserError(f"no configuration is given: panda sweep CONFIG --KEY VALUE,VALUE.\n{in_short(usage)}")
    if not varied:
        words = next((words for words in given if len(words) > 2), [])
        meant = (
            f" `{' '.join(words)}` is one value, a list: `{words[0]} {','.join(words[1:])}` is several."
            if words
            else ""
        )
        raise UserError(f"nothing varies: give a flag several values, as in `--learning_rate 1e-4,3e-4`.{meant}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "a sweep is not started by a launcher, but starts one for each run: panda sweep ... --launch"
            ' "torchrun --nproc_per_node N --no-python".'
        )
    stem = Path(own["config"].partition(":")[2] or own["config"]).stem
    folder = resolve_path(own["output_dir"]) if own.get("output_dir") else Path("runs") / f"sweep-{stem}"
    points = list(_points(folder, ["--config", own["config"], *shared], varied))
    for name, count in Counter(point.name for point in points).items():
        if count > 1:
            raise UserError(f"two of the runs would be in one folder, {name}. Write their values so that they differ.")
    return Sweep(folder, points, shlex.split(own.get("launch", "")), bool({"print", "dry_run"} & {*own}))


def split_values(text: str) -> list[list[str]]:
    """The values in ``text``, each as the words that a flag would be given. Raises UserError."""
    values: list[list[str]] = []
    for part in _between_commas(text):
        bracketed = re.fullmatch(r"\[([^\[\]]*)\]", part)
        words = _between_commas(bracketed[1]) if bracketed else [part]
        if "" in words and (bracketed or len(text) > 0):
            raise UserError(
                f"{text!r}: a value between commas is missing. Write A,B, and `\\,` for a comma in a value."
            )
        values.append([word.replace("\\,", ",") for word in words])
    return values


def _between_commas(text: str) -> list[str]:
    """The parts of ``text`` between commas, but not those within brackets or after a backslash."""
    parts, depth, begun = [], 0, 0
    for place, character in enumerate(text):
        depth = max(0, depth + {"[": 1, "]": -1}.get(character, 0))
        if character == "," and depth == 0 and text[place - 1 : place] != "\\":
            parts.append(text[begun:place].strip())
            begun = place + 1
    return [*parts, text[begun:].strip()]


def name_of(words: Sequence[str]) -> str:
    """A value in the name of a folder. A long one is cut, and told from others by a hash."""
    text = "+".join(words)
    plain = re.sub(r"[^\w.+-]+", "-", text).strip("-")
    if plain == text and len(plain) <= LONGEST:
        return plain
    return f"{plain[:LONGEST]}-{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:6]}"


def _check_different(flag: str, values: list[list[str]]) -> None:
    for number, value in enumerate(values):
        if value in values[:number]:
            raise UserError(f"{flag}: {' '.join(value)!r} is given twice.")


def _points(folder: Path, shared: list[str], varied: dict[str, list[tuple[str, list[str]]]]) -> Iterator[Point]:
    for values in itertools.product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        name = ",".join(f"{flag.lstrip('-').replace('-', '_')}={short}" for flag, (short, _) in chosen.items())
        title = ",".join(
            f"{flag.lstrip('-').replace('-', '_')}={'+'.join(words)}" for flag, (_, words) in chosen.items()
        )
        flags = [word for flag, (_, words) in chosen.items() for word in (flag, *words)]
        directory = folder / name
        yield Point(name, directory, [*shared, *flags, "--output_dir", str(directory), "--resume", "auto"], title)
