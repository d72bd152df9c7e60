"""Options that say where something is, and the path that such a text means."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


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


def resolve_path(text: str) -> Path:
    """The path that an option means: ``PACKAGE:`` begins one inside an installed package, ``panda:`` or another."""
    return path_in_package(text) or Path(text).expanduser()


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
