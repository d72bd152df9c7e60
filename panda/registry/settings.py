"""The value of each key, and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from panda.registry.errors import UserError
from panda.registry.options import REQUIRED
from panda.registry.options import Given
from panda.registry.options import Location
from panda.registry.options import Option

CORE = "run"
"""Owner of the core options."""


@dataclass(frozen=True)
class Setting:
    """The value of one key, and where it came from."""

    key: str
    value: Any
    origin: str
    """``default``, ``arch llama-7b``, ``run.yaml:3`` or ``--learning_rate``."""
    owner: str
    """``CORE`` for a core option, else the label of the component: ``optimizer adamw``."""
    location: Location | None = None
    """The mark of a path; None for other options."""


def convert_options(
    options: Mapping[str, Option],
    given: Mapping[str, Given],
    owner: str = CORE,
    overrides: Mapping[str, Any] | None = None,
    overriding: str = "",
) -> tuple[dict[str, Setting], list[str]]:
    """The value of each of ``options``, and the problems of those that have none."""
    settings: dict[str, Setting] = {}
    problems: list[str] = []
    for key, option in options.items():
        if key in given:
            try:
                settings[key] = Setting(key, option.convert(given[key]), given[key].origin, owner, option.location)
            except UserError as problem:
                problems.append(str(problem))
        elif overrides and key in overrides:
            settings[key] = Setting(key, overrides[key], overriding, owner, option.location)
        elif option.default is REQUIRED:
            problems.append(f"{key}: {owner} needs a value: {option.expects}. {option.doc}")
        else:
            settings[key] = Setting(key, option.default, "default", owner, option.location)
    return settings, problems
