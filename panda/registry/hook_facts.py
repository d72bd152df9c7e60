"""What each hook is, for lists: read from its specification, which is the only place that says so."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from panda.registry import hookspecs
from panda.registry.errors import UserError
from panda.registry.errors import did_you_mean

RANKS = {"rank 0 only": "rank 0", "the ranks that see it": "those that see it"}
"""What documentation says of the ranks on which a hook is called, where these are not all."""


@dataclass(frozen=True)
class HookFacts:
    """One hook."""

    name: str
    arguments: tuple[str, ...]
    """An implementation takes any subset of them."""
    doc: str
    line: int
    """Of its specification, in panda/registry/hookspecs.py."""

    @property
    def ranks(self) -> str:
        """The ranks that call it."""
        lower = " ".join(self.doc.lower().split())
        return next((ranks for words, ranks in RANKS.items() if words in lower), "every rank")

    @property
    def when(self) -> str:
        """The first sentence of its documentation."""
        return " ".join(self.doc.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def hooks() -> list[HookFacts]:
    """Every hook, in the order of the specifications."""
    found = []
    for name, specification in vars(hookspecs).items():
        if name.startswith("panda_"):
            arguments = tuple(inspect.signature(specification).parameters)
            line = specification.__code__.co_firstlineno
            found.append(HookFacts(name, arguments, inspect.cleandoc(specification.__doc__ or ""), line))
    return found


def hook_named(name: str) -> HookFacts:
    """The hook called ``name``, with or without `panda_`. Raises UserError for any other word."""
    known = {each.name: each for each in hooks()}
    found = known.get(name) or known.get(f"panda_{name}")
    if found is None:
        full = name if name.startswith("panda_") else f"panda_{name}"
        raise UserError(f"unknown hook {name!r}.{did_you_mean(full, known)} `panda list hooks` shows all.")
    return found
