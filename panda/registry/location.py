"""Options that say where something is, and the path that such a text means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Location:
    """Marks a text, or each text of a list, that says where something is: ``Annotated[str, Location()]``.

    A run gets the text as it was written, and its config.yaml has it as an absolute path, unless it is a URL.
    Locations are left out of the comparison with a run that is continued: the same thing may have moved.
    """

    on_hub: bool = False
    """Whether it may be a name on the Hugging Face hub, which is kept, or in ``pretrained-models``."""


def resolve_path(text: str) -> Path:
    """The path that an option means: ``panda:`` begins one inside the installed panda package."""
    if text.startswith("panda:"):
        import panda

        return Path(panda.__file__).parent / text.removeprefix("panda:")
    return Path(text).expanduser()
