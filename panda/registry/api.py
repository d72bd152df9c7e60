"""The version of what packages and configurations rely on, and what panda gained with each.

A configuration says with ``api: 1``, and a package with an entry point, ``panda.api: version = v1``, for which version
it was written. What panda gained later takes nothing from them: neither a name that a package had, nor a key.

A release that adds a name or a key of every run raises ``API_VERSION``, and enters both here with that version;
tests/registry/api.json has those of version 1, and a test compares.
"""

from __future__ import annotations

from panda.registry.errors import UserError

API_VERSION = 1
"""Raised by a release in which panda gains names of components or keys of every run, or removes what was promised."""

GAINED_NAMES: dict[tuple[str, str], int] = {}
"""Names of panda's own components, ``("optimizer", "muon")``, by the version with which panda gained them.

A name that is not here was there in version 1.
"""

GAINED_KEYS: dict[str, int] = {}
"""The same for keys of every run."""


def gained_name(kind: str, name: str) -> int:
    """The version with which panda gained its component ``name``, in any case."""
    return GAINED_NAMES.get((kind, name.lower()), 1)


def gained_key(key: str) -> int:
    """The version with which panda gained the ``key`` of every run."""
    return GAINED_KEYS.get(key, 1)


def checked_api(text: str, who: str, *, remedy: str = "") -> int:
    """The version that ``text`` states. Raises UserError for what is no version, or is one that this panda lacks.

    ``who`` states it; ``remedy``: what to do beside installing another panda.
    """
    if not (text.isdecimal() and int(text) >= 1):
        raise UserError(f"{who}: {text!r} is not a version of panda's API: expected a number from 1 to {API_VERSION}.")
    if int(text) > API_VERSION:
        raise UserError(
            f"{who}: it was written for version {text} of panda's API, and this panda has version {API_VERSION}."
            f" Install a newer one, `pip install --upgrade panda-train`{remedy}."
        )
    return int(text)
