"""What is wrong with components in a folder of the user's, ``user_dir``: its files are imported in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from panda.installation.findings import Finding
from panda.installation.probe import examined
from panda.registry import Catalog
from panda.registry import Offer
from panda.registry.user_files import offers_in_folder


def examine_folder(folder: Path) -> tuple[list[Offer], list[Finding]]:
    """What the files in ``folder`` declare, and what is wrong with it. Raises UserError where it is no folder."""
    offers, unread = offers_in_folder(folder, "--user_dir")
    found = [Finding(str(folder), problem.rstrip("."), "Mend the file, or move it elsewhere.") for problem in unread]
    return offers, [*found, *(finding for offer in offers for finding in _examine(offer))]


def _examine(offer: Offer) -> Iterator[Finding]:
    others = Catalog().matches(offer.kind, offer.name)
    if others:
        problem = f"{offer.name!r} is also a name of {' and '.join(dict.fromkeys(each.provider for each in others))}"
        advice = f"Write `{offer.qualified}` for this one, or rename it."
        yield Finding(offer.describe(), problem, advice, is_broken=False)
    answer = examined(offer)
    for problem, advice in answer["problems"]:
        yield Finding(offer.describe(), problem.removeprefix(f"{offer.describe()}: "), advice)
