"""The hooks that are live in a run.

pluggy's own ``load_setuptools_entrypoints`` imports every plugin of a group, and one that fails
stops them all. Here the modules that a run chose, and the objects that its plugins' factories made, become
pluggy plugins, so hooks are live in the runs that chose them and in no others.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import types
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

import pluggy

from panda.registry import hookspecs
from panda.registry.errors import UserError
from panda.registry.errors import did_you_mean
from panda.registry.kinds import KINDS
from panda.registry.offers import Offer

if TYPE_CHECKING:
    from panda.registry.resolve import Resolved

HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("panda_"))
STATE = ("panda_save_state", "panda_load_state")
"""Hooks of which a plugin has both or neither."""
ALIKE = 0.85
"""How alike the name of an unmarked function and that of a hook are, from 0 to 1, where it must be one misspelt."""


@dataclass(frozen=True)
class Caller:
    """Whose hook is being called."""

    offer: Offer
    acts: bool
    """Whether it may ask the run for something. False where it has ``acts = False``."""

    @property
    def label(self) -> str:
        return self.offer.label


_caller: ContextVar[Caller | None] = ContextVar("panda_caller", default=None)


def caller() -> Caller | None:
    """Whose hook is being called; None outside of hooks."""
    return _caller.get()


class Hooks:
    """The live hooks of a run: ``call.panda_log(run=run, record=record)`` calls all implementations of one."""

    def __init__(self) -> None:
        self._plugins = pluggy.PluginManager("panda")
        self._plugins.add_hookspecs(hookspecs)
        self.call: Any = self._plugins.hook

    def add(self, plugin: object, offer: Offer) -> None:
        """Make the hooks of ``plugin``, a module or an object, which came with ``offer``, live.

        Raises UserError for what was meant as a hook and would never be called, or would do nothing.
        """
        check_hooks(plugin, offer)
        live = _Live(plugin, offer, len(self._plugins.get_plugins()))
        try:
            self._plugins.register(live)
        except pluggy.PluginValidationError as problem:
            if self._plugins.is_registered(live):  # pluggy 1.6 checks after it has registered
                self._plugins.unregister(live)
            reason = " ".join(str(problem).partition("\n")[2].split()).rstrip(".")  # the first line names `live`
            raise UserError(
                f"{offer.describe()}: {reason}. panda/registry/hookspecs.py says what each hook is given."
            ) from problem

    def has(self, hook: str) -> bool:
        """Whether anything implements ``hook``."""
        return bool(getattr(self.call, hook).get_hookimpls())

    def acts(self, hook: str) -> bool:
        """Whether something that implements ``hook`` may ask the run for something."""
        return any(found.plugin.caller.acts for found in getattr(self.call, hook).get_hookimpls())

    def by_plugin(self, hook: str) -> list[tuple[Offer, Callable[..., Any]]]:
        """Of each plugin that implements ``hook``, in the order of registration, its offer and a call of its own."""
        plugins = [live for live in self._plugins.get_plugins() if hasattr(live, hook)]
        plugins.sort(key=lambda live: live.number)
        return [(live.caller.offer, functools.partial(self._of_one, live, hook)) for live in plugins]

    def _of_one(self, live: Any, hook: str, **arguments: Any) -> Any:
        others = [other for other in self._plugins.get_plugins() if other is not live]
        returned = self._plugins.subset_hook_caller(hook, others)(**arguments)
        return returned[0] if returned else None

    def exception(self, run: Any, error: BaseException) -> None:
        """Call every ``panda_exception``. A failure of one is noted on ``error``, which is the one to be seen."""
        plugins = [found.plugin for found in reversed(self.call.panda_exception.get_hookimpls())]
        for plugin in plugins:
            others = [other for other in plugins if other is not plugin]
            try:
                self._plugins.subset_hook_caller("panda_exception", others)(run=run, error=error)
            except Exception as second:
                notes = " ".join(getattr(second, "__notes__", ()))
                error.add_note(f"then a panda_exception hook failed: {second!r} {notes}".rstrip())


def live_hooks(resolved: Resolved) -> Hooks:
    """The hooks in the modules of all that ``resolved`` chose. The objects that its plugins make are added later."""
    hooks = Hooks()
    modules: dict[str, Offer] = {}
    for offer in [*(chosen.offer for chosen in resolved.chosen), *resolved.hook_modules]:
        modules.setdefault(offer.module, offer)  # llama and llama-7b share one
    for module, offer in modules.items():
        hooks.add(importlib.import_module(module), offer)
    for chosen in resolved.chosen:
        factory = chosen.component.factory
        if inspect.isclass(factory):  # live once there is an object of it; mistakes are found now
            check_hooks(factory, chosen.offer)
        elif not inspect.isroutine(factory):
            hooks.add(factory, chosen.offer)
    return hooks


def has_hooks(plugin: object) -> bool:
    """Whether anything in ``plugin`` is marked as a hook, or named like one. ``Hooks.add`` takes both or neither."""
    return any(_marked(plugin, name) or name in HOOKS or _means_a_hook(name) for name in dir(plugin))


def add_built(hooks: Hooks, resolved: Resolved, model: object) -> None:
    """Make hooks that are methods of what the factories of ``resolved`` have made live. Its plugins' are already.

    What comes before a run builds schedules and models, too, to describe it. The run has the schedule that was built
    last, and ``model``. Of a kind that a package adds, a task has all that it built.
    """
    for chosen in resolved.chosen:
        kind = chosen.component.kind
        if kind == "model":
            built = [each for each in chosen.built if each is model]
        elif kind == "plugin":
            built = []
        else:
            built = chosen.built[-1:] if kind in KINDS else chosen.built
        for each in built:
            hooks.add(each, chosen.offer)


class _Live:
    """The hook implementations of ``plugin`` and nothing else of it, each attributed to ``offer``.

    pluggy looks at every attribute of what it is given, and in a module any of them may be a lazy import.
    """

    def __init__(self, plugin: object, offer: Offer, number: int) -> None:
        self.caller = Caller(offer, inspect.getattr_static(plugin, "acts", True) is not False)
        self.number = number
        for name in HOOKS:
            if _marked(plugin, name):
                setattr(self, name, _attributed(getattr(plugin, name), name, self.caller))


@contextmanager
def _calling(called: Caller, part: str) -> Iterator[None]:
    token = _caller.set(called)
    try:
        with called.offer.attributed(part):
            yield
    finally:
        _caller.reset(token)


def _attributed(hook: Callable[..., Any], name: str, called: Caller) -> Callable[..., Any]:
    part = f"the hook {name}"

    @functools.wraps(hook)  # pluggy reads the mark and the names of the arguments through it
    def call(*arguments: Any) -> Any:
        with _calling(called, part):
            return hook(*arguments)

    @functools.wraps(hook)
    def call_around(*arguments: Any) -> Any:
        with _calling(called, part):
            return (yield from hook(*arguments))

    return call_around if inspect.isgeneratorfunction(hook) else call


def _function(plugin: object, name: str) -> types.FunctionType | None:
    """The function that ``plugin`` has under ``name``, bound or not; None where it is something else."""
    value = inspect.getattr_static(plugin, name, None)  # evaluates no property
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    return value if isinstance(value, types.FunctionType) else None


def implements(plugin: object, hook: str) -> bool:
    """Whether ``plugin``, a module, an object or a class, has ``hook``."""
    return _marked(plugin, hook)


def _marked(plugin: object, name: str) -> bool:
    return hasattr(_function(plugin, name), "panda_impl")


def check_hooks(plugin: object, offer: Offer) -> None:
    """Raise UserError for what was meant as a hook and would never be called, or would do nothing.

    ``plugin`` is a module, an object or a class.
    """
    for name in dir(plugin):
        hook = _function(plugin, name)
        mark = getattr(hook, "panda_impl", None)
        if hook is None or hasattr(hook, "panda_spec") or (mark is None and not _means_a_hook(name)):
            continue
        problem = None
        if mark is None and name not in HOOKS:
            problem = f"is no hook of panda's, and not marked with @hookimpl.{did_you_mean(name, HOOKS)}"
        elif mark is None:
            problem = "is not marked with @hookimpl, so it would never be called. Write the mark above it."
        elif name not in HOOKS:
            problem = f"is no hook of panda's.{did_you_mean(name, HOOKS)} The hooks are: {', '.join(HOOKS)}."
        elif inspect.iscoroutinefunction(hook) or inspect.isasyncgenfunction(hook):
            problem = "is async, and nothing would await it. Write a plain `def`."
        elif inspect.isgeneratorfunction(hook) and not (mark["wrapper"] or mark["hookwrapper"]):
            problem = (
                "has a `yield`, so nothing in it would run: write it without, or mark it with @hookimpl(wrapper=True)"
                " if it goes around the others."
            )
        else:
            problem = _problem_of_arguments(plugin, name, hook)
        if problem:
            raise UserError(f"{offer.describe()}: {name!r} {problem}")
    has = [name for name in STATE if _marked(plugin, name)]
    if len(has) == 1:
        missing = next(name for name in STATE if name not in has)
        raise UserError(f"{offer.describe()}: it has {has[0]} and not {missing}: what is saved has to be loaded.")


def _problem_of_arguments(plugin: object, name: str, hook: types.FunctionType) -> str | None:
    """What is wrong with what ``hook``, which ``plugin`` has under ``name``, takes; None if nothing is.

    pluggy gives a hook what it names, but never what has a default.
    """
    given = tuple(inspect.signature(getattr(hookspecs, name)).parameters)
    taken = list(inspect.signature(hook).parameters.values())
    if not isinstance(plugin, types.ModuleType) and not isinstance(inspect.getattr_static(plugin, name), staticmethod):
        taken = taken[1:]  # self
    may = f"it may take any of {', '.join(given)} (`panda show hook {name}`)."
    for each in taken:
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            continue
        if each.name not in given and each.default is each.empty:
            return f"takes {each.name!r}, which it is not given: {may}"
        if each.name in given and each.default is not each.empty:
            return f"has a default for {each.name!r}, so it would never be given it. Leave the default out."
    return None


def _means_a_hook(name: str) -> bool:
    """Whether ``name``, of a function without a mark, is that of a hook, perhaps misspelt."""
    return name.startswith("panda_") and bool(difflib.get_close_matches(name, HOOKS, n=1, cutoff=ALIKE))
