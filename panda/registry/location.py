"""Options that say where something is, and what path they mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Location:
    """Marks a text, or each text of a list, that says where something is: ``Annotated[str, Location()]``.

    A run gets it as it was written, and keeps it absolute in its config.yaml, but for a URL. Where a thing is is
    not what it is: a run that is continued may have it elsewhere.
    """

    on_hub: bool = False
    """Whether it may be a name on the Hugging Face hub, or in ``pretrained-models``: the first stays one."""


def resolve_path(text: str) -> Path:
    """The path that an option means: ``panda:`` begins one inside the installed panda package."""
    if text.startswith("panda:"):
        import panda

        return Path(panda.__file__).parent / text.removeprefix("panda:")
    return Path(text).expanduser()
