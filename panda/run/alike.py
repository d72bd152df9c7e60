"""Whether every rank was started with the same configuration, packages and data: each reads its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from panda.data.ingredients import versions
from panda.data.origin import origins_of
from panda.data.token_dataset import SampleSet
from panda.engine.meeting import spoken
from panda.engine.processes import Processes
from panda.registry import UserError
from panda.run.preparation import Preparation

OF_EACH_MACHINE = ("num_workers", "prefetch_factor")
"""Keys that may differ, besides paths: no number of a run follows from them."""
MOST_SAID = 5
"""Differences that are listed."""
SHOWN = 60
"""Characters of a value that are shown."""

Facts = Mapping[str, Any]
"""By what they are of: plain objects."""


def refuse_unlike(prepared: Preparation, processes: Processes) -> None:
    """Raise UserError on all ranks where they would not train the same. Every rank has to call it."""
    if processes.world_size == 1:
        return
    facts, sources = _facts(prepared), _sources(prepared)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).hexdigest()
    if len(set(processes.from_all(digest))) == 1:
        return
    found = processes.from_all((facts, sources))
    told = list(_differences([of_rank for of_rank, _ in found], [of_rank for _, of_rank in found]))
    more = [f"and {len(told) - MOST_SAID} more"] if len(told) > MOST_SAID else []

    def refuse() -> None:
        raise UserError(
            f"the ranks were not started alike: {'; '.join([*told[:MOST_SAID], *more])}. Start all of them with the"
            " same command, files and packages."
        )

    processes.together(refuse)


def _facts(prepared: Preparation) -> Facts:
    """What has to be the same. Paths may differ, since machines may have the same files elsewhere."""
    resolved = prepared.resolved
    settings = {key: each.value for key, each in resolved.settings.items() if each.location is None}
    packages = {chosen.label: chosen.offer.provider for chosen in resolved.chosen}
    return {
        **{key: value for key, value in settings.items() if key not in OF_EACH_MACHINE},
        **packages,
        **versions("torch", "transformers", "deepspeed", "peft", "bitsandbytes"),
        **_of_data("the data", prepared.dataset),
        **{
            key: value
            for name, each in prepared.held_out.items()
            for key, value in _of_data(_named(name), each).items()
        },
    }


def _of_data(what: str, dataset: SampleSet) -> Facts:
    return {f"samples of {what}": len(dataset), f"tokens of {what}": dataset.tokens, what: dataset.fingerprint}


def _named(held_out: str) -> str:
    return f"the held-out data {held_out}".rstrip()


def _sources(prepared: Preparation) -> Facts:
    """What the data is of: its files, and how samples are made of them."""
    found: dict[str, Any] = {}
    for dataset in [prepared.dataset, *prepared.held_out.values()]:
        for origin in origins_of(dataset):
            found |= {name: f"{size:,} bytes ({digest})" for name, size, digest in origin["files"]}
            found |= {f"{key} of {origin['location']}": value for key, value in origin["made"].items()}
    return found


def _differences(facts: Sequence[Facts], sources: Sequence[Facts]) -> Iterator[str]:
    """In words, what differs between ranks."""
    differing = list(_differing(facts))
    of_data = {key for key in differing if key.startswith(("the data", "the held-out data"))}
    for key in differing:
        if key not in of_data:
            yield _said(key, [of_rank.get(key) for of_rank in facts])
    if of_data:
        listed = [_said(key, [of_rank.get(key) for of_rank in sources]) for key in _differing(sources)]
        yield from listed or [f"{' and '.join(sorted(of_data))}: its rows, or how samples are made of them"]


def _differing(facts: Sequence[Facts]) -> Iterator[str]:
    for key in dict.fromkeys(key for of_rank in facts for key in of_rank):
        if any(of_rank.get(key) != facts[0].get(key) for of_rank in facts):
            yield key


def _said(key: str, values: Sequence[Any]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault("not set" if value is None else f"{value!s:.{SHOWN}}", []).append(rank)
    return f"{key} is {' and '.join(f'{text} on {spoken(those)}' for text, those in ranks.items())}"
