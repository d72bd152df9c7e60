"""What to say of a key that nothing in a run takes."""

from __future__ import annotations

from collections.abc import Mapping

from panda.registry.catalog import Catalog
from panda.registry.components import Component
from panda.registry.errors import did_you_mean
from panda.registry.offers import with_readable_source
from panda.registry.options import Given

CHOSEN_BY = {name: name for name in ("task", "model", "optimizer", "lr_scheduler", "reader")} | {"plugin": "plugins"}
"""The key by which a run chooses a component, by kind."""


def unknown_key_messages(
    catalog: Catalog,
    keys: list[str],
    given: Mapping[str, Given],
    known: list[str],
    renamed: Mapping[str, str],
    chosen: list[Component],
) -> list[str]:
    """A message for each of ``keys``, which nothing in this run takes."""
    if not keys:
        return []
    offers = [offer for kind in catalog.kinds for offer in catalog.offers(kind)]
    readable = with_readable_source(offers)
    unread = len({offer.module for offer in offers} - {offer.module for offer in readable})
    declared: dict[str, list[str]] = {}
    for offer in readable:
        for key in offer.declaration.keys if offer.declaration else ():
            declared.setdefault(key, []).append(f"{offer.kind} {offer.name}")

    def message(key: str) -> str:
        at = given[key].origin
        if key in renamed and key not in declared:
            return f"{at}: {key!r} is not one of panda's keys: {renamed[key]}"
        if given[key].is_nested:
            return given[key].nested_problem(key)
        users = declared.get(key.rpartition(".")[2])
        if users:
            its_kinds = {user.split()[0] for user in users}
            instead = ", ".join(f"{c.kind} {c.name}" for c in chosen if c.kind in its_kinds) or "none of these"
            flags = [f"`--{CHOSEN_BY[kind]} {name}`" for kind, name in map(str.split, users) if kind in CHOSEN_BY]
            how = f": {' or '.join(flags)}" if flags else ""
            return (
                f"{at}: {key!r} is known, but nothing that this run chose uses it: it is an option of"
                f" {', '.join(users)}, and the run has {instead}. Leave it out, or choose what uses it{how}."
            )
        hint = did_you_mean(key, known)
        if not hint and (hint := did_you_mean(key, declared)):
            hint += " That is an option of a component that this run did not choose."
        hint = hint or " `panda-train --help` lists the keys; one from a newer panda is unknown to this one."
        others = f" Options of {unread:,} modules of other packages were not looked through." if unread else ""
        return f"{at}: unknown key {key!r}.{hint}{others}"

    return [message(key) for key in keys]
