"""Finds components by name. Names come from package metadata; only a named module is imported.

pluggy's own ``load_setuptools_entrypoints`` imports every plugin of a group, and one that fails
stops them all. Here a name is looked up in the metadata, its one module is imported, and only then
does that module become a pluggy plugin, so that hooks which it defines are live in the runs that
chose it and in no others.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import re
import traceback
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pluggy

from panda.registry import hookspecs
from panda.registry.components import Component
from panda.registry.components import recorded
from panda.registry.components import recorded_names
from panda.registry.declarations import Declaration
from panda.registry.declarations import declarations
from panda.registry.errors import UserError
from panda.registry.errors import did_you_mean
from panda.registry.kinds import KINDS
from panda.registry.options import options_of

OWN_DISTRIBUTION = "panda-train"
"""The name under which panda itself is installed."""


@dataclass(frozen=True)
class Offer:
    """An entry point: a distribution says that one of its modules registers this name."""

    kind: str
    name: str
    module: str
    distribution: str
    version: str

    @property
    def qualified(self) -> str:
        """The spelling that means this offer and no other: ``acme-panda:rwkv``."""
        return f"{self.distribution}:{self.name}"

    @property
    def declaration(self) -> Declaration | None:
        """What the module's source says of this name, without importing it."""
        for declared in declarations(self.module):
            if declared.kind == self.kind and self.name.lower() in map(str.lower, declared.names):
                return declared
        return None

    def describe(self) -> str:
        return f"{self.distribution} {self.version} (entry point {KINDS[self.kind].group}: {self.name} = {self.module})"


@functools.cache
def _offers() -> tuple[Offer, ...]:
    """The one metadata scan of a process. ``_offers.cache_clear()`` forgets it."""
    installed = _entry_points()
    offers: dict[Offer, None] = {}  # ordered, and a distribution that repeats itself says a thing once
    described: dict[int, tuple[str, str]] = {}
    for kind in KINDS.values():
        for entry in installed.select(group=kind.group):
            key = id(entry.dist)
            if key not in described:  # reading a version parses a file: once a distribution
                described[key] = _name_and_version(entry.dist)
            module = entry.value.partition(":")[0].partition("[")[0].strip()
            offers[Offer(kind.name, entry.name, module, *described[key])] = None
    return tuple(sorted(offers, key=lambda offer: (offer.kind, offer.name.lower(), offer.distribution)))


def _entry_points() -> Any:
    try:
        return importlib.metadata.entry_points()
    except Exception:  # one distribution's entry_points.txt cannot be parsed: leave that one out, not all
        found: dict[str, list[importlib.metadata.EntryPoint]] = {}
        for distribution in importlib.metadata.distributions():
            name = _name_and_version(distribution)[0]
            if name not in found:  # the first on sys.path is the one that is imported
                try:
                    found[name] = list(distribution.entry_points)
                except Exception:
                    found[name] = []
        return importlib.metadata.EntryPoints(entry for entries in found.values() for entry in entries)


def _name_and_version(distribution: importlib.metadata.Distribution | None) -> tuple[str, str]:
    """Of a distribution, also where it has lost its METADATA file."""
    if distribution is None:
        return "?", "?"
    try:
        name, version = distribution.metadata["Name"], distribution.metadata["Version"]
    except Exception:
        name, version = None, None
    folder = getattr(distribution, "_path", None)
    return _normalised(name or (folder.name.partition("-")[0] if folder else "?")), version or "?"


def _normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


class _PluginManager(pluggy.PluginManager):
    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        # pytest's rule: look at names with the prefix alone. pluggy would read every attribute of
        # a module, and with it whatever lazy import hides behind one.
        return super().parse_hookimpl_opts(plugin, name) if name.startswith("panda_") else None


class Catalog:
    """The components that are installed, less the blocked ones.

    ``blocked`` holds distributions, modules or plugin names that must not be imported
    (``-p no:NAME``).
    """

    def __init__(self, blocked: Iterable[str] = ()) -> None:
        self.blocked = frozenset(name.lower() for name in blocked)
        self._blocked_distributions = frozenset(map(_normalised, self.blocked))
        if OWN_DISTRIBUTION in self._blocked_distributions:
            raise UserError(f"-p no:{OWN_DISTRIBUTION}: panda cannot block itself.")
        self.plugins = _PluginManager("panda")
        self.plugins.add_hookspecs(hookspecs)
        self._sources: dict[str, Offer] = {}
        if not any(offer.distribution == OWN_DISTRIBUTION for offer in _offers()):
            raise UserError(
                "panda's own components are not registered: its source is importable, but it is not installed."
                " Run `pip install -e .` where setup.cfg is."
            )

    def offers(self, kind: str) -> list[Offer]:
        """Everything of ``kind`` that is installed and not blocked. Imports nothing."""
        return [offer for offer in _offers() if offer.kind == kind and not self.is_blocked(offer)]

    def find(self, kind: str, reference: str, origin: str = "") -> Offer:
        """The offer that ``reference`` means: a name, in any case, or ``distribution:name``. Imports nothing.

        ``origin`` is where the reference was written. Raises UserError where no offer or more than
        one answers.
        """
        at = f"{origin}: " if origin else ""
        matches = self.matches(kind, reference)
        allowed = [offer for offer in matches if not self.is_blocked(offer)]
        if len(allowed) == 1:
            return allowed[0]
        if len({offer.distribution for offer in allowed}) == 1:
            declared = " and ".join(f"{offer.name} = {offer.module}" for offer in allowed)
            raise UserError(
                f"{at}{kind} {reference!r} is declared {len(allowed)} times by {allowed[0].distribution}"
                f" {allowed[0].version}: {declared}. This is a fault of {allowed[0].distribution}."
            )
        if allowed:
            providers = "".join(f"\n  {offer.qualified:30} {offer.describe()}" for offer in allowed)
            raise UserError(
                f"{at}{kind} {reference!r} is offered by {len(allowed)} distributions. Say which one:{providers}"
            )
        if matches:
            providers = ", ".join(offer.describe() for offer in matches)
            raise UserError(f"{at}{kind} {reference!r} is provided by {providers}, but that is blocked by `-p no:`.")
        known = self.offers(kind)
        others = [other for other_kind in KINDS if other_kind != kind for other in self.matches(other_kind, reference)]
        elsewhere = "".join(f" There is {other.kind} {other.name!r}." for other in others)
        raise UserError(
            f"{at}unknown {kind} {reference!r}."
            f"{did_you_mean(reference, [o.name for o in known] + [o.qualified for o in known])}{elsewhere}"
            f" `panda list {KINDS[kind].plural}` shows what is installed."
        )

    def matches(self, kind: str, reference: str) -> list[Offer]:
        """Every installed offer that ``reference`` can mean, the blocked ones too. Imports nothing."""
        distribution, _, name = reference.rpartition(":")
        return [
            offer
            for offer in _offers()
            if offer.kind == kind
            and offer.name.lower() == name.lower()
            and (not distribution or offer.distribution == _normalised(distribution))
        ]

    def is_blocked(self, offer: Offer) -> bool:
        """Whether ``-p no:`` names the distribution or the module of ``offer`` or, of a plugin, its name."""
        names = {offer.module.lower()} | ({offer.name.lower()} if offer.kind == "plugin" else set())
        return offer.distribution in self._blocked_distributions or bool(names & self.blocked)

    def unused_blocks(self) -> list[str]:
        """What is blocked and not installed: perhaps misspelt."""
        known = {offer.distribution for offer in _offers()}
        names = {offer.module.lower() for offer in _offers()}
        names |= {offer.name.lower() for offer in _offers() if offer.kind == "plugin"}
        return sorted(name for name in self.blocked if name not in names and _normalised(name) not in known)

    def load(self, offer: Offer) -> Component | None:
        """Import the module behind ``offer``, make its hooks live, and return what it registered.

        None only for a lifecycle plugin that is a module of hooks. Raises UserError where the
        module does not import, names a hook that panda has not, or lacks what the metadata promises.
        """
        module = self._activate(offer)
        component = recorded(offer.kind, offer.name, module.__name__)
        if component is None and not (offer.kind == "plugin" and self._has_hooks(module)):
            present = recorded_names(offer.kind, module.__name__)
            has = f"it registers {', '.join(map(repr, present))}" if present else f"it registers no {offer.kind}"
            raise UserError(
                f"{offer.describe()} promises {offer.kind} {offer.name!r}, but importing {offer.module} did not"
                f" register that name: {has}. This is a fault of {offer.distribution}"
                " (or of a stale installation: reinstall it)."
            )
        if component is not None:
            try:
                options_of(component.options)
            except Exception as problem:  # a type that no text converts to, or that names what is not imported
                raise UserError(f"{component.describe()}: its options cannot be used: {problem}.") from problem
        return component

    def add_hooks(self, plugin: object, name: str, offer: Offer) -> None:
        """Make the hooks of ``plugin``, of ``offer``, live. Raises UserError for a hook that panda has not."""
        described = offer.describe()
        _check_hook_names(plugin, described)
        self._sources[name] = offer
        try:
            self.plugins.register(plugin, name=name)
            self.plugins.check_pending()
        except Exception as problem:
            if self.plugins.has_plugin(name):  # a failed check leaves it registered
                self.plugins.unregister(name=name)
            if not isinstance(problem, pluggy.PluginValidationError):
                raise
            reason = " ".join(str(problem).split()).rstrip(".")
            raise UserError(
                f"{described}: {reason}. panda/registry/hookspecs.py says what each hook is given."
            ) from problem

    def tell_source(self, error: BaseException) -> None:
        """Add to ``error``, where it came out of a hook, whose that is, and how a run does without."""
        codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
        for name in _HOOKS:
            for found in getattr(self.plugins.hook, name).get_hookimpls():
                function = inspect.unwrap(getattr(found.function, "__func__", found.function))
                if getattr(function, "__code__", None) in codes:
                    offer = self._sources[found.plugin_name]
                    instead = (
                        f"`-p no:{offer.name}` runs without it."
                        if offer.kind == "plugin"
                        else f"It comes with {offer.kind} {offer.name!r}."
                    )
                    error.add_note(f"This came out of the hook {name} of {offer.describe()}. {instead}")
                    return

    def tell_exception(self, run: Any, error: BaseException) -> None:
        """Call every ``panda_exception``; that one fails is noted on ``error``, which is what has to be seen."""
        plugins = [found.plugin for found in reversed(self.plugins.hook.panda_exception.get_hookimpls())]
        for plugin in plugins:
            others = [other for other in plugins if other is not plugin]
            try:
                self.plugins.subset_hook_caller("panda_exception", others)(run=run, error=error)
            except Exception as second:
                self.tell_source(second)
                notes = " ".join(getattr(second, "__notes__", ()))
                error.add_note(f"then a panda_exception hook failed: {second!r} {notes}".rstrip())

    def _activate(self, offer: Offer) -> Any:
        try:
            module = importlib.import_module(offer.module)
        except (Exception, SystemExit) as problem:
            if isinstance(problem, UserError):
                raise UserError(f"while importing {offer.describe()}: {problem}") from problem
            raise UserError(
                f"could not import {offer.module}, which {offer.describe()} names for {offer.kind} {offer.name!r}:"
                f"\n  {type(problem).__name__}: {problem}{_place(problem)}"
                "\nPANDA_TRACEBACK=1 shows the whole traceback."
            ) from problem
        if not self.plugins.is_registered(module):  # llama-7b and llama-65b share a module
            self.add_hooks(module, module.__name__, offer)
        return module

    def _has_hooks(self, module: Any) -> bool:
        return bool(self.plugins.get_hookcallers(module))


_CALLABLES = (types.FunctionType, staticmethod, classmethod)
_HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("panda_"))


def _check_hook_names(plugin: object, described: str) -> None:
    """Raise UserError for what was meant as a hook implementation and would never be called.

    pluggy is only shown names that begin with ``panda_``, and looks at nothing that is unmarked.
    """
    for name in dir(plugin):
        value = inspect.getattr_static(plugin, name, None)
        marked = hasattr(value, "panda_impl") if isinstance(value, _CALLABLES) else False
        if marked and name not in _HOOKS:
            raise UserError(
                f"{described}: {name!r} is no hook of panda's.{did_you_mean(name, _HOOKS)}"
                f" The hooks are: {', '.join(_HOOKS)}."
            )
        if not marked and name in _HOOKS and isinstance(value, _CALLABLES) and not hasattr(value, "panda_spec"):
            raise UserError(f"{described}: {name!r} is not marked with @hookimpl, so it would never be called.")


def _place(problem: BaseException) -> str:
    """Where in somebody's source an import failed; empty where that is nowhere, as for a module that is not there."""
    if isinstance(problem, SyntaxError):  # the traceback ends where the file was read
        return f"\n  at {problem.filename}:{problem.lineno}"
    frames = [f for f in traceback.extract_tb(problem.__traceback__) if not f.filename.startswith("<frozen")]
    if not frames or frames[-1].filename in (__file__, importlib.__file__):
        return ""
    return f"\n  at {frames[-1].filename}:{frames[-1].lineno}"
