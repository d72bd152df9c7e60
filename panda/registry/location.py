"""Options that say where something is, and the path that such a text means."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from panda.registry.errors import UserError


@dataclass(frozen=True)
class Location:
    """Marks a text, or each text of a list, that says where something is: ``Annotated[str, Location()]``.

    A run gets the text as it was written, and its config.yaml has it as an absolute path, unless it is a URL.
    Locations are left out of the comparison with a run that is continued: the same thing may have moved.
    """

    on_hub: bool = False
    """Whether it may be a name on the Hugging Face hub, which is kept, or in ``pretrained-models``."""
    holds_data: bool = False
    """Whether it holds files for the reader: then they are looked for before anything slow is imported."""


_LONGEST, _LONGEST_NAME = 4095, 255
"""Bytes of a path, and of a name in it, on Linux."""


def resolve_path(text: str) -> Path:
    """The path that an option means: ``PACKAGE:`` begins one inside an installed package, ``panda:`` or another.

    Raises UserError where it begins with the folder of a user who is not known.
    """
    return path_in_package(text) or expanded(text)


def expanded(text: str) -> Path:
    """The path ``text``, with the folder of the user for ``~``. Raises UserError where there is none."""
    whose = text.partition("/")[0]
    try:
        path = Path(text).expanduser()
        home = Path(whose).expanduser() if whose[:1] == "~" and whose != "~" else None
    except (RuntimeError, KeyError):
        what = "this user has no home folder (HOME is not set)" if whose == "~" else f"there is no user {whose[1:]!r}"
        raise UserError(f"{text!r}: {what}. Write the whole path.") from None
    if home and not home.is_dir():  # root could make it
        raise UserError(f"{text!r}: {whose[1:]!r} has no home folder ({home} does not exist). Write the whole path.")
    return path


def problem_of_path(text: str) -> str | None:
    """Why there can be no file or folder ``text``; None where there can."""
    if not text.strip():
        return "It is empty: leave the key out, or name a path; `.` is the working folder."
    if "\0" in text:
        return "A path has no NUL."
    size = len(os.fsencode(text))
    longest = max(len(os.fsencode(part)) for part in text.split("/"))
    if size > _LONGEST or longest > _LONGEST_NAME:
        return f"A path has at most {_LONGEST:,} bytes, each name in it {_LONGEST_NAME}; this has {size:,}."
    return None


def path_in_package(text: str) -> Path | None:
    """The path inside an installed package that ``text`` means, if it does: ``acme_panda:data/sample``.

    No package is imported. In one that is not panda it has to exist, and ``FOLDER:SPLIT``, a split of a folder here,
    comes first.
    """
    package, colon, inside = text.partition(":")
    if not (colon and package.isidentifier()):
        return None
    is_split = package != "panda" and "/" not in inside and os.path.lexists(package)
    found = None if is_split else find_spec(package)
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(next(iter(found.submodule_search_locations))) / inside
    return path if package == "panda" or (inside and path.exists()) else None
