"""How the options of the components that a run names are written in it: alone, or with a prefix where names clash."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Mapping
from dataclasses import dataclass

from panda.registry.api import gained_key
from panda.registry.choosing import NAMING
from panda.registry.choosing import Owner
from panda.registry.choosing import own_prefix
from panda.registry.choosing import prefix
from panda.registry.components import Component
from panda.registry.options import Given
from panda.registry.options import Option
from panda.registry.options import options_of
from panda.registry.settings import CORE


@dataclass(frozen=True)
class Keys:
    """How the options of the components that a run names are written in it."""

    shared: Mapping[str, list[Component]]
    """Options that several components have, by name."""
    core: Collection[str]
    """Options that have the name of a core option."""
    taken: Mapping[str, Component]
    """Of those: the ones that were there before the core option, and that the name alone means."""
    named_alike: Collection[str]
    """Prefixes that several components have as their names, or one as its name and another as its kind."""
    warnings: tuple[str, ...]

    def written(self, component: Component, key: str) -> str:
        """How the option ``key`` of ``component`` is written in this run."""
        return f"{prefix(component)}.{key}" if key in self.shared or key in self.core else key

    def spellings(self, component: Component, key: str) -> list[str]:
        """All ways to write it: with its kind or its name before it, and alone where that means no other."""
        names = [prefix(component)]
        if own_prefix(component) not in self.named_alike:
            names.append(own_prefix(component))
        spelled = [f"{name}.{key}" for name in dict.fromkeys(names)]
        alone = self.taken.get(key) is component if key in self.core else key not in self.shared
        return [*spelled, key] if alone else spelled


def keys_of(
    owners: list[Owner], core_options: Mapping[str, Option], given: Mapping[str, Given], api: int | None
) -> Keys:
    """How the options of ``owners`` are written, where the configuration states the version ``api``, or none."""
    having: dict[str, list[Owner]] = {}
    for owner in owners:
        for key in options_of(owner[1].options):
            having.setdefault(key, []).append(owner)
    shared = {key: [component for _, component in several] for key, several in having.items() if len(several) > 1}
    core = [key for key in having if key in core_options]
    taken: dict[str, Component] = {}
    warnings = []
    for key in core:
        (offer, component), *others = having[key]
        stated = int(offer.api) if api is None and offer.api else api
        is_older = stated is not None and gained_key(key) > stated and key not in NAMING
        if key in given and is_older and not others:
            taken[key] = component
        if key in given and given[key].origin:
            means = f"that of {component.kind} {component.name}" if key in taken else "that of every run"
            whole = " and ".join(f"`{prefix(each)}.{key}`" for _, each in having[key])
            warnings.append(
                f"{given[key].origin}: {key!r} is taken as {means}. Every run has a key of this name, which can be"
                f" written `{CORE}.{key}`, and {' and '.join(f'{each.kind} {each.name}' for _, each in having[key])},"
                f" whose key is {whole}."
            )
    names = [own_prefix(component) for _, component in owners]
    prefixes = {prefix(component) for _, component in owners if prefix(component) != own_prefix(component)}
    alike = {name for name in names if names.count(name) > 1 or name in prefixes or name == CORE}
    return Keys(shared, core, taken, alike, tuple(warnings))


def given_to(
    component: Component, given: Mapping[str, Given], keys: Keys
) -> tuple[dict[str, Given], set[str], list[str]]:
    """The values given for the options of ``component``, every key that it answers to, and the problems."""
    mine: dict[str, Given] = {}
    known: set[str] = set()
    problems: list[str] = []
    for key in options_of(component.options):
        spellings = keys.spellings(component, key)
        known |= {key, *spellings}
        if key in keys.shared and key not in keys.core and key in given:
            several = keys.shared[key]
            others = " and ".join(f"`{prefix(c)}.{key}` ({c.kind} {c.name})" for c in several)
            problems.append(f"{given[key].origin}: {key!r} is an option of more than one: write {others}.")
        for spelling in spellings:
            if spelling in given:
                if key in mine:
                    problems.append(f"{given[spelling].origin}: {key!r} is also given at {mine[key].origin}.")
                mine[key] = given[spelling]
    return mine, known, problems
