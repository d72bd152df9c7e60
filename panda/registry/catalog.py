"""Finds components by name. Names come from package metadata; only a named module is imported."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from panda.registry.components import Component
from panda.registry.components import recorded
from panda.registry.components import recorded_names
from panda.registry.errors import UserError
from panda.registry.errors import did_you_mean
from panda.registry.hooks import has_hooks
from panda.registry.offers import OWN_DISTRIBUTION
from panda.registry.offers import Offer
from panda.registry.offers import all_installed
from panda.registry.offers import installed
from panda.registry.offers import kinds
from panda.registry.offers import normalised
from panda.registry.offers import strays
from panda.registry.soundness import refuse_unsound


class Catalog:
    """The components that are installed, except the blocked ones.

    ``blocked`` holds distributions, modules or plugin names that must not be imported
    (``-p no:NAME``).
    """

    def __init__(self, blocked: Iterable[str] = ()) -> None:
        self.blocked = frozenset(name.lower() for name in blocked)
        self._blocked_distributions = frozenset(map(normalised, self.blocked))
        if OWN_DISTRIBUTION in self._blocked_distributions:
            raise UserError(f"-p no:{OWN_DISTRIBUTION}: panda cannot block itself.")
        if not any(offer.is_own for offer in all_installed()):
            raise UserError(
                "panda's own components are not registered: its source is importable, but it is not installed."
                " Run `pip install -e .` where setup.cfg is."
            )

    def offers(self, kind: str) -> list[Offer]:
        """Everything of ``kind`` that is installed and not blocked. Imports nothing."""
        return [offer for offers in installed()[kind].values() for offer in offers if not self.is_blocked(offer)]

    def find(self, kind: str, reference: str, origin: str = "") -> Offer:
        """The offer that ``reference`` means: a name, in any case, or ``distribution:name``. Imports nothing.

        A name without a distribution that panda has means panda's own, so that no package that is installed changes
        what a configuration means. ``origin`` is where the reference was written. Raises UserError where otherwise not
        exactly one offer matches.
        """
        at = f"{origin}: " if origin else ""
        if len(providers := kinds()[kind].providers) > 1:
            raise UserError(
                f"{at}kind {kind!r} is added by {len(providers)} distributions, and what one means by it the others may"
                f" not: {', '.join(providers)}. Uninstall all but one."
            )
        matches = self.matches(kind, reference)
        allowed = [offer for offer in matches if not self.is_blocked(offer)]
        if ":" not in reference:
            allowed = [offer for offer in allowed if offer.is_own] or allowed
        if len(allowed) == 1:
            return allowed[0]
        if len({offer.distribution for offer in allowed}) == 1:
            declared = " and ".join(f"{offer.name} = {offer.module}" for offer in allowed)
            raise UserError(
                f"{at}{kind} {reference!r} is declared {len(allowed)} times by {allowed[0].distribution}"
                f" {allowed[0].version}: {declared}. This is a fault of {allowed[0].distribution}."
            )
        if allowed:
            choices = "".join(f"\n  {offer.qualified:30} {offer.describe()}" for offer in allowed)
            raise UserError(
                f"{at}{kind} {reference!r} is offered by {len(allowed)} distributions. Say which one:{choices}"
            )
        if matches:
            offered = ", ".join(offer.describe() for offer in matches)
            raise UserError(f"{at}{kind} {reference!r} is provided by {offered}, but that is blocked by `-p no:`.")
        others = [other for each in kinds() if each != kind for other in self.matches(each, reference)]
        elsewhere = "".join(f" There is {other.kind} {other.name!r}." for other in others)
        raise UserError(
            f"{at}unknown {kind} {reference!r}.{did_you_mean(reference, self.spellings(kind, reference))}{elsewhere}"
            f"{strays(reference)}"
            f" `panda list {kinds()[kind].plural}` shows what is installed."
        )

    def spellings(self, kind: str, reference: str) -> list[str]:
        """What ``reference`` may be a misspelling of: names, or ``distribution:name`` where it is so written."""
        return [offer.qualified if ":" in reference else offer.name for offer in self.offers(kind)]

    def matches(self, kind: str, reference: str) -> list[Offer]:
        """Every installed offer that ``reference`` can mean, the blocked ones too. Imports nothing."""
        distribution, _, name = reference.rpartition(":")
        named = installed()[kind].get(name.lower(), ())
        return [offer for offer in named if not distribution or offer.distribution == normalised(distribution)]

    def is_blocked(self, offer: Offer) -> bool:
        """Whether ``-p no:`` names the distribution or the module of ``offer`` or, of a plugin, its name."""
        return bool(self.blocked) and (
            offer.distribution in self._blocked_distributions
            or offer.module.lower() in self.blocked
            or (offer.kind == "plugin" and offer.name.lower() in self.blocked)
        )

    def unused_blocks(self) -> list[str]:
        """The blocked names that nothing installed has: perhaps misspelt."""
        known = {offer.distribution for offer in all_installed()}
        names = {offer.module.lower() for offer in all_installed()} | set(installed()["plugin"])
        return sorted(name for name in self.blocked if name not in names and normalised(name) not in known)

    def load(self, offer: Offer) -> Component | None:
        """Import the module of ``offer``, and return what it registered.

        None only for a lifecycle plugin that is a module of hooks. Raises UserError where the
        module does not import, or lacks what the metadata promises.
        """
        module = _import(offer)
        component = recorded(offer.kind, offer.name, module.__name__)
        if component is None and not (offer.kind == "plugin" and has_hooks(module)):
            present = recorded_names(offer.kind, module.__name__)
            has = f"it registers {', '.join(map(repr, present))}" if present else f"it registers no {offer.kind}"
            raise UserError(
                f"{offer.describe()} promises {offer.kind} {offer.name!r}, but importing {offer.module} did not"
                f" register that name: {has}. This is a fault of {offer.distribution}"
                " (or of a stale installation: reinstall it)."
            )
        if component is not None:
            refuse_unsound(component, offer)
        return component


def _import(offer: Offer) -> ModuleType:
    try:
        return importlib.import_module(offer.module)
    except KeyboardInterrupt:
        raise
    except BaseException as problem:  # one that ends Python, too
        if isinstance(problem, UserError):
            examined = f"`panda doctor {offer.distribution}` examines the package."
            raise UserError(f"while importing {offer.describe()}: {problem}\n{examined}") from problem
        raise UserError(
            f"could not import {offer.module}, which {offer.describe()} names for {offer.kind} {offer.name!r}:"
            f"\n  {type(problem).__name__}: {problem}{place(problem, offer.module)}"
            f"\nMend the module, or install what it lacks: `panda doctor {offer.distribution}` examines the package."
            "\nPANDA_TRACEBACK=1 shows the whole traceback."
        ) from problem


def place(problem: BaseException, module: str) -> str:
    """Where in the source importing ``module`` failed; empty where it failed in none, as for one that is not there.

    The last place in the package of ``module`` is named, and only if there is none the last of all.
    """
    if isinstance(problem, SyntaxError):  # the traceback ends where the file was read
        return f"\n  at {problem.filename}:{problem.lineno}" if problem.filename else ""
    frames = [f for f in traceback.extract_tb(problem.__traceback__) if not f.filename.startswith("<frozen")]
    if not frames or frames[-1].filename in (__file__, importlib.__file__):
        return ""
    root = module.partition(".")[0]
    own = [f for f in frames if root in Path(f.filename).with_suffix("").parts]
    return f"\n  at {(own or frames)[-1].filename}:{(own or frames)[-1].lineno}"
