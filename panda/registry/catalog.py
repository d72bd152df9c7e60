"""Finds components by name. Names come from package metadata; only a named module is imported."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from panda.registry.api import checked_api
from panda.registry.api import gained_name
from panda.registry.components import Component
from panda.registry.components import importing
from panda.registry.components import recorded
from panda.registry.components import recorded_names
from panda.registry.errors import EndedBySignal
from panda.registry.errors import UserError
from panda.registry.errors import did_you_mean
from panda.registry.hooks import has_hooks
from panda.registry.location import resolve_path
from panda.registry.offers import IN_PROCESS
from panda.registry.offers import OWN_DISTRIBUTION
from panda.registry.offers import USER_DIR
from panda.registry.offers import Offer
from panda.registry.offers import all_installed
from panda.registry.offers import by_name
from panda.registry.offers import installed
from panda.registry.offers import kinds_of
from panda.registry.offers import normalised
from panda.registry.offers import strays
from panda.registry.soundness import refuse_unsound
from panda.registry.user_files import make_importable
from panda.registry.user_files import named_file
from panda.registry.user_files import note_executed
from panda.registry.user_files import offers_in_file
from panda.registry.user_files import offers_in_folder
from panda.registry.user_files import unreadable


class Catalog:
    """The components that are installed or that the user's files offer, except the blocked ones.

    ``blocked`` holds distributions, modules or plugin names that must not be imported (``-p no:NAME``); ``beside``,
    what is offered beside what is installed, and ``unread``, why more is not; ``api``, the version of panda's API
    that the configuration states. Unless it ``runs_files``, a file that a reference names is an error.
    """

    def __init__(
        self,
        blocked: Iterable[str] = (),
        *,
        beside: Iterable[Offer] = (),
        unread: Iterable[str] = (),
        api: int | None = None,
        runs_files: bool = True,
    ) -> None:
        self.blocked = frozenset(name.lower() for name in blocked)
        self.api = api
        self._unread = tuple(unread)
        self._runs_files = runs_files
        self._in_use: set[Path] = set()  # files of the user that this run has imported
        self._blocked_distributions = frozenset(map(normalised, self.blocked))
        if OWN_DISTRIBUTION in self._blocked_distributions:
            raise UserError(f"-p no:{OWN_DISTRIBUTION}: panda cannot block itself.")
        if not any(offer.is_own for offer in all_installed()):
            raise UserError(
                "panda's own components are not registered: its source is importable, but it is not installed."
                " Run `pip install -e .` where setup.cfg is."
            )
        self._offers = installed()
        if beside := list(beside):
            every = [*all_installed(), *beside]
            self._offers = by_name(every, {**installed(), **{each.name: () for each in beside if each.kind == "kind"}})
        self.kinds = kinds_of(self._offers["kind"])
        """Every kind of component by name."""

    def offers(self, kind: str) -> list[Offer]:
        """Everything of ``kind`` that is there and not blocked. Imports nothing."""
        return [offer for offers in self._offers[kind].values() for offer in offers if not self.is_blocked(offer)]

    def find(self, kind: str, reference: str, origin: str = "", *, by: Offer | None = None) -> Offer:
        """The offer that ``reference`` means: a name, in any case, ``distribution:name`` or ``FILE.py:name``.

        Imports nothing. A name without a distribution that panda has means panda's own, so that no package that is
        installed changes what a configuration means; one that panda gained after the version of its API that the
        configuration states, or the package of ``by`` whose reference it is, is an error. ``origin`` is where the
        reference was written. Raises UserError where otherwise not exactly one offer matches.
        """
        at = f"{origin}: " if origin else ""
        if file := named_file(reference):
            return self._find_in_file(kind, reference, *file, at)
        if len(providers := self.kinds[kind].providers) > 1:
            raise UserError(
                f"{at}kind {kind!r} is added by {len(providers)} distributions, and what one means by it the others may"
                f" not: {', '.join(providers)}. Uninstall all but one."
            )
        matches = self.matches(kind, reference)
        allowed = [offer for offer in matches if not self.is_blocked(offer)]
        if ":" not in reference:
            allowed = self._preferred(allowed, reference, at, by)
        if len(allowed) == 1:
            return allowed[0]
        if allowed and len({offer.distribution for offer in allowed}) == 1:
            raise UserError(f"{at}{_declared_often(reference, allowed)}")
        if allowed:
            choices = "".join(f"\n  {offer.qualified:30} {offer.describe()}" for offer in allowed)
            raise UserError(
                f"{at}{kind} {reference!r} is offered by {len(allowed)} distributions. Say which one:{choices}"
            )
        if matches:
            offered = ", ".join(offer.describe() for offer in matches)
            raise UserError(f"{at}{kind} {reference!r} is provided by {offered}, but that is blocked by `-p no:`.")
        raise UserError(at + self._unknown(kind, reference))

    def _preferred(self, allowed: list[Offer], reference: str, at: str, by: Offer | None) -> list[Offer]:
        """Those of ``allowed`` that a ``reference`` without a distribution means."""
        own = [offer for offer in allowed if offer.is_own]
        stated, who = self.api, "this configuration"
        if by is not None:
            stated, who = checked_api(by.api, by.describe()) if by.api else None, by.provider
        if own and stated is not None and (gained := gained_name(own[0].kind, own[0].name)) > stated:
            others = [offer for offer in allowed if not offer.is_own]
            names = " or ".join(f"`{offer.qualified}`" for offer in (*own, *others))
            had = (
                f"it is a name of {' and '.join(offer.describe() for offer in others)}, too"
                if others
                else ("before, it was a name of a package, which is not installed")
            )
            raise UserError(
                f"{at}{own[0].kind} {reference!r}: panda has a component of this name since version {gained} of its"
                f" API, and {who} is written for version {stated}; {had}. Write {names}."
            )
        return own or allowed

    def _find_in_file(self, kind: str, reference: str, file: Path, name: str, at: str) -> Offer:
        """The offer of the component ``name`` in ``file``, or, if that is empty, of its only one of ``kind``."""
        if not self._runs_files:
            raise UserError(f"{at}{kind} {reference!r} {_IN_FILE}")
        found = [offer for offer in offers_in_file(file, at) if offer.kind == kind]
        matches = [offer for offer in found if not name or offer.name.lower() == name.lower()]
        if len(matches) == 1:
            return matches[0]
        if matches and name:
            raise UserError(f"{at}{_declared_often(reference, matches)}")
        names = ", ".join(f"`{file}:{offer.name}`" for offer in found)
        raise UserError(
            f"{at}{file}: "
            + (f"it declares several of kind {kind}. Name one: {names}." if matches else "")
            + ("" if matches else f"it declares no {kind}" + (f" {name!r}" if name else ""))
            + ("" if matches else f". It has {names}." if found else _DECLARES_NONE.format(kind=kind))
        )

    def _unknown(self, kind: str, reference: str) -> str:
        """What to say of a ``reference`` that nothing answers to."""
        provider = reference.rpartition(":")[0]
        if normalised(provider) == normalised(USER_DIR):
            hint = f" It is one of a folder of the user's: add `--user_dir FOLDER`, the folder that has {kind}"
            hint += f" {reference.rpartition(':')[2]!r}."
            return f"unknown {kind} {reference!r}." + (hint if self._runs_files else f" It {_IN_FILE}")
        if normalised(provider) == normalised(IN_PROCESS):
            hint = " It was registered by the process that called `panda.train`: register it again there, and call that"
            return f"unknown {kind} {reference!r}.{hint} with this configuration."
        near = did_you_mean(reference, self.spellings(kind, reference))
        parts = [part.strip() for part in reference.split(",")]
        if len(parts) > 1 and any(self.matches(kind, part) for part in parts):
            near = (
                f" These are several names: write `[{', '.join(parts)}]` in a file, `{' '.join(parts)}` after a flag."
            )
        others = [other for each in self.kinds if each != kind for other in self.matches(each, reference)]
        elsewhere = "".join(f" There is {other.kind} {other.name!r}." for other in others)
        if provider and normalised(provider) not in {offer.distribution for offer in all_installed()}:
            elsewhere += f" No component of a distribution {provider} is installed: `pip install {provider}`."
            elsewhere += f" `-p no:{reference.rpartition(':')[2]}` runs without it." if kind == "plugin" else ""
        return (
            f"unknown {kind} {reference!r}.{near}{elsewhere}{strays(reference)} `panda list {self.kinds[kind].plural}`"
            f" shows what is installed.{''.join(f' Not read: {problem}' for problem in self._unread)}"
        )

    def spellings(self, kind: str, reference: str) -> list[str]:
        """What ``reference`` may be a misspelling of: names, or ``distribution:name`` where it is so written."""
        return [offer.qualified if ":" in reference else offer.name for offer in self.offers(kind)]

    def matches(self, kind: str, reference: str) -> list[Offer]:
        """Every offer that ``reference``, of no file, can mean, the blocked ones too. Imports nothing."""
        distribution, _, name = reference.rpartition(":")
        named = self._offers[kind].get(name.lower(), ())
        wanted = normalised(distribution)
        return [offer for offer in named if not distribution or normalised(offer.distribution) == wanted]

    def has(self, kind: str, reference: str) -> bool:
        """Whether anything answers to ``reference``, blocked or not; of a file, whether it can be looked into."""
        if file := named_file(reference):
            if not self._runs_files or unreadable(file[0]):
                return False
            named = [offer.name.lower() for offer in offers_in_file(file[0], "") if offer.kind == kind]
            return file[1].lower() in named if file[1] else bool(named)
        return bool(self.matches(kind, reference))

    def is_blocked(self, offer: Offer) -> bool:
        """Whether ``-p no:`` names the distribution or the module of ``offer`` or, of a plugin, its name."""
        return bool(self.blocked) and (
            normalised(offer.distribution) in self._blocked_distributions
            or offer.module.lower() in self.blocked
            or (offer.kind == "plugin" and offer.name.lower() in self.blocked)
        )

    def blocks_plugin(self, reference: str) -> bool:
        """Whether ``-p no:`` names what ``reference`` means: its plugins, or if there are none, the name itself."""
        if matches := self.matches("plugin", reference):
            return all(map(self.is_blocked, matches))
        distribution, _, name = reference.lower().rpartition(":")
        return name in self.blocked or normalised(distribution) in self._blocked_distributions

    def unused_blocks(self) -> list[str]:
        """The blocked names that nothing installed has: perhaps misspelt, or of a plugin that is no longer there."""
        every = [offer for names in self._offers.values() for offers in names.values() for offer in offers]
        known = {normalised(offer.distribution) for offer in every}
        names = {offer.module.lower() for offer in every} | set(self._offers["plugin"])
        return sorted(name for name in self.blocked if name not in names and normalised(name) not in known)

    def load(self, offer: Offer) -> Component | None:
        """Import the module of ``offer``, and return what it registered.

        None only for a lifecycle plugin that is a module of hooks. Raises UserError where the
        module does not import, or lacks what the metadata promises, and where its distribution states a version of
        panda's API that this panda lacks.
        """
        if offer.api:
            checked_api(offer.api, offer.describe(), remedy=f", or an older {offer.distribution}")
        module = self._imported(offer)
        component = recorded(offer.kind, offer.name, module.__name__)
        if component is None and not (offer.kind == "plugin" and has_hooks(module)):
            present = recorded_names(offer.kind, module.__name__)
            if offer.file:
                raise UserError(
                    f"{offer.describe()}: it is declared there, and importing the file did not register it. A"
                    " declaration stands at the top of a file, in no branch, and nothing may take its name."
                )
            has = f"it registers {', '.join(map(repr, present))}" if present else f"it registers no {offer.kind}"
            raise UserError(
                f"{offer.describe()} promises {offer.kind} {offer.name!r}, but importing {offer.module} did not"
                f" register that name: {has}. This is a fault of {offer.distribution}"
                " (or of a stale installation: reinstall it)."
            )
        if component is not None:
            refuse_unsound(component, offer)
        return component

    def _imported(self, offer: Offer) -> ModuleType:
        is_of_user = bool(offer.file) and offer.distribution != IN_PROCESS
        if is_of_user:
            if problem := unreadable(Path(offer.file)):
                raise UserError(problem)
            make_importable(offer, self._in_use)
        try:
            with importing():
                module = importlib.import_module(offer.module)
            if is_of_user:
                note_executed(offer)
                self._in_use.add(Path(offer.file))
            return module
        except (KeyboardInterrupt, EndedBySignal):
            raise
        except BaseException as problem:  # one that ends Python, too
            examined = "" if is_of_user else f"`panda doctor {offer.distribution}` examines the package."
            if isinstance(problem, UserError):
                raise UserError(f"while importing {offer.describe()}: {problem}\n{examined}".rstrip()) from problem
            what = (
                f"{offer.file} for {offer.kind} {offer.name!r}"
                if is_of_user
                else f"{offer.module}, which {offer.describe()} names for {offer.kind} {offer.name!r}"
            )
            mend = "" if is_of_user else f"\nMend the module, or install what it lacks: {examined}"
            raise UserError(
                f"could not import {what}:\n  {type(problem).__name__}: {problem}{place(problem, offer.module)}{mend}"
                "\nPANDA_TRACEBACK=1 shows the whole traceback."
            ) from problem


def catalog_with(folder: str | None, blocked: Iterable[str] = ()) -> Catalog:
    """What is installed and not ``blocked``, and what is in ``folder``, the value of ``--user_dir``, if it is given."""
    if folder is None:
        return Catalog(blocked)
    offers, unread = offers_in_folder(resolve_path(folder).absolute(), "--user_dir")
    return Catalog(blocked, beside=offers, unread=unread)


_IN_FILE = "is in a file of the user's, and only training runs these."

_DECLARES_NONE = (
    '. A declaration is read in the source: `@register_{kind}("NAME")`, with the name written out, at the top of the'
    " file."
)


def _declared_often(reference: str, offers: list[Offer]) -> str:
    """What to say of several ``offers`` of one provider that a ``reference`` may mean."""
    first = offers[0]
    if first.file:
        places = " and ".join(f"{offer.file}:{offer.line}" for offer in offers)
        return f"{first.kind} {reference!r} is declared {len(offers)} times: {places}. Rename all but one."
    declared = " and ".join(f"{offer.name} = {offer.module}" for offer in offers)
    return (
        f"{first.kind} {reference!r} is declared {len(offers)} times by {first.provider}: {declared}. This is a fault"
        f" of {first.distribution}."
    )


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
