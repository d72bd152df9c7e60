"""The facts that a run and its continuation have to share, and how they differ where they do. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from panda.files.terminal import number_of
from panda.registry import UserError

MADE_OF = "made_of"
"""The entry that says what the hashes among the others are of. It is not compared: files may have been moved."""
MOST_SAID = 5
"""Differences of the data that are listed."""
_SHOWN = 60
"""Characters of a value that are shown."""


def refuse_differing(source: Path, recorded: dict[str, Any], agreement: dict[str, Any]) -> None:
    """Raise UserError where what ``source`` ``recorded`` of its run differs from ``agreement``, of this one.

    What only one of the two runs states is not compared: a newer component may have gained an option.
    """
    here = json.loads(json.dumps(agreement))  # as what was written and read again: a tuple is a list
    differing = [
        _explained(key, before, here[key], recorded.get(MADE_OF), here.get(MADE_OF))
        for key, before in recorded.items()
        if key in here and key != MADE_OF and here[key] != before
    ]
    if differing:
        raise UserError(
            f"{source}: this run cannot continue that one: {'; '.join(differing)}."
            " Give the values that it had, or start a run of its own."
        )


def _explained(key: str, before: Any, now: Any, then: Any, here: Any) -> str:
    """How the value of ``key`` differs. ``then`` and ``here``: what the hashes of the two runs are of."""
    if key == "data":
        return f"the data differs: {'; '.join(_of_data(then, here))}"
    if key == "base_weights" and isinstance(then, Mapping) and isinstance(here, Mapping):
        if then.get("base") == here.get("base"):
            return f"the weights of the base have changed since then, at {here.get('base')} ({before}, and now {now})"
        return f"the base was {then.get('base')} ({before}), and is {here.get('base')} ({now})"
    if key == "reference_weights":
        return f"the weights of the frozen model were others ({before}, and now {now})"
    return f"{key} was {before!r} and is {now!r}"


def _of_data(then: Any, here: Any) -> list[str]:
    if not isinstance(then, Mapping) or not isinstance(here, Mapping):
        return ["that run did not record which files, template and tokenizer it had"]
    found = [
        f"{key} was {then.get(key)!r}, and is {here.get(key)!r}"
        for key in ("max_samples", "eval_fraction")
        if then.get(key) != here.get(key)
    ]
    try:
        found += _of_data_sets(then["data_sets"], here["data_sets"])
    except (KeyError, TypeError, ValueError, AttributeError):  # what a checkpoint says can be anything
        found.append("what that run recorded of it has another form")
    return found or ["the samples that the task makes are others, of the same files, template and tokenizer"]


def _of_data_sets(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """What differs between the origins of the data sets of two runs (see ``panda.data.origin``), with both values."""
    found = []
    if len(before) != len(now):
        found.append(f"{number_of(len(before), 'data set')} then, {number_of(len(now), 'data set')} now")
    for then, here in zip(before, now, strict=False):
        found += _in_files(then, here)
        found += _in_values("", then.get("made"), here.get("made"))
    found = list(dict.fromkeys(found))  # a template of several data sets
    more = len(found) - MOST_SAID
    return [*found[:MOST_SAID], f"and {number_of(more, 'more difference')}"] if more > 0 else found


def _in_files(then: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    files = [{str(name): (size, digest) for name, size, digest in record.get("files", [])} for record in (then, here)]
    files[0] = {_same_file(name, files[1]): each for name, each in files[0].items()}
    contents = [[digest for _, digest in each.values()] for each in files]
    if contents[0] == contents[1] and None not in contents[0] and files[0]:
        return  # perhaps moved
    if sorted(files[0].items()) == sorted(files[1].items()) and list(files[0]) != list(files[1]):
        yield f"the files of {here['location']} come in another order"
    for name, (size, digest) in files[0].items():
        if name not in files[1]:
            yield f"{name} ({number_of(size, 'byte')}) was read, and is not now"
        elif files[1][name][0] != size:
            yield f"{name} had {number_of(size, 'byte')}, and has {files[1][name][0]:,}"
        elif files[1][name][1] != digest:
            yield f"{name} has another content, of the same {number_of(size, 'byte')}"
    for name in files[1].keys() - files[0].keys():
        yield f"{name} ({number_of(files[1][name][0], 'byte')}) is read, and was not"
    for key, unit in (("count", "files"), ("bytes", "bytes"), ("rows", "rows")):
        if then.get(key) != here.get(key) and (key == "rows" or not (files[0] and files[1])):
            yield f"{here['location']} had {then.get(key):,} {unit}, and has {here.get(key):,}"


def _same_file(name: str, names: Collection[str]) -> str:
    """The path in ``names`` that ends in ``name``; ``name`` itself if there is none, or several.

    A run records paths as they were given, and has absolute ones when it goes on from its config.yaml.
    """
    found = [each for each in names if each.endswith(f"/{name.removeprefix('./')}")]
    return found[0] if name not in names and len(found) == 1 else name


def _in_values(name: str, then: Any, here: Any) -> Iterator[str]:
    """The differences of two values of JSON, each named by the innermost key."""
    if then == here:
        return
    if isinstance(then, dict) and isinstance(here, dict):
        for key in [*then, *(key for key in here if key not in then)]:
            yield from _in_values(key if not name else f"{name}, {key}", then.get(key), here.get(key))
    elif isinstance(then, list) and isinstance(here, list) and len(then) == len(here):
        for one, other in zip(then, here, strict=True):
            yield from _in_values(name, one, other)
    elif isinstance(then, str) and isinstance(here, str) and _is_hash(then) and _is_hash(here):
        yield f"the content of the {name} is another"
    elif isinstance(then, str) and isinstance(here, str) and ("\n" in then + here or len(then + here) > 2 * _SHOWN):
        yield f"the {name} was {_from(then, here)}, and is {_from(here, then)}"
    else:
        yield f"the {name} was {then!r}, and is {here!r}"


def _is_hash(text: str) -> bool:
    return len(text) == 64 and not set(text) - set("0123456789abcdef")


def _from(text: str, other: str) -> str:
    """``text`` from a little before the place at which ``other`` differs."""
    first = next((place for place, (one, two) in enumerate(zip_longest(text, other)) if one != two), 0)
    begin = max(0, first - _SHOWN // 3)
    shown = text[begin : begin + _SHOWN]
    return f"{'...' * (begin > 0)}{shown!r}{'...' * (begin + _SHOWN < len(text))}"
