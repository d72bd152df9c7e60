"""The hooks that are live in a run.

pluggy's own ``load_setuptools_entrypoints`` imports every plugin of a group, and one that fails
stops them all. Here the modules that a run chose, and the objects that its plugins' factories made, become
pluggy plugins, so hooks are live in the runs that chose them and in no others.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
from collections.abc import Callable
from typing import TYPE_CHECKING
from typing import Any

import pluggy

from panda.registry import hookspecs
from panda.registry.errors import UserError
from panda.registry.errors import did_you_mean
from panda.registry.offers import Offer

if TYPE_CHECKING:
    from panda.registry.resolve import Resolved

HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("panda_"))


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
        _check(plugin, offer)
        live = _Live(plugin, offer)
        try:
            self._plugins.register(live)
        except pluggy.PluginValidationError as problem:
            if self._plugins.is_registered(live):  # pluggy 1.6 checks after it has registered
                self._plugins.unregister(live)
            reason = " ".join(str(problem).partition("\n")[2].split()).rstrip(".")  # the first line names `live`
            raise UserError(
                f"{offer.describe()}: {reason}. panda/registry/hookspecs.py says what each hook is given."
            ) from problem

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
    return hooks


def has_hooks(plugin: object) -> bool:
    """Whether anything in ``plugin`` is marked as a hook, or named like one. ``Hooks.add`` takes both or neither."""
    return any(_marked(plugin, name) or name in HOOKS for name in dir(plugin))


class _Live:
    """The hook implementations of ``plugin`` and nothing else of it, each attributed to ``offer``.

    pluggy looks at every attribute of what it is given, and in a module any of them may be a lazy import.
    """

    def __init__(self, plugin: object, offer: Offer) -> None:
        for name in HOOKS:
            if _marked(plugin, name):
                setattr(self, name, _attributed(getattr(plugin, name), name, offer))


def _attributed(hook: Callable[..., Any], name: str, offer: Offer) -> Callable[..., Any]:
    part = f"the hook {name}"

    @functools.wraps(hook)  # pluggy reads the mark and the names of the arguments through it
    def call(*arguments: Any) -> Any:
        with offer.attributed(part):
            return hook(*arguments)

    @functools.wraps(hook)
    def call_around(*arguments: Any) -> Any:
        with offer.attributed(part):
            return (yield from hook(*arguments))

    return call_around if inspect.isgeneratorfunction(hook) else call


def _function(plugin: object, name: str) -> types.FunctionType | None:
    """The function that ``plugin`` has under ``name``, bound or not; None where it is something else."""
    value = inspect.getattr_static(plugin, name, None)  # evaluates no property
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    return value if isinstance(value, types.FunctionType) else None


def _marked(plugin: object, name: str) -> bool:
    return hasattr(_function(plugin, name), "panda_impl")


def _check(plugin: object, offer: Offer) -> None:
    """Raise UserError for what was meant as a hook and would never be called, or would do nothing."""
    for name in dir(plugin):
        hook = _function(plugin, name)
        mark = getattr(hook, "panda_impl", None)
        if hook is None or (mark is None and (name not in HOOKS or hasattr(hook, "panda_spec"))):
            continue
        problem = None
        if mark is None:
            problem = "is not marked with @hookimpl, so it would never be called."
        elif name not in HOOKS:
            problem = f"is no hook of panda's.{did_you_mean(name, HOOKS)} The hooks are: {', '.join(HOOKS)}."
        elif inspect.iscoroutinefunction(hook) or inspect.isasyncgenfunction(hook):
            problem = "is async, and nothing would await it: write a plain `def`."
        elif inspect.isgeneratorfunction(hook) and not (mark["wrapper"] or mark["hookwrapper"]):
            problem = (
                "has a `yield`, so nothing in it would run: write it without, or mark it with @hookimpl(wrapper=True)"
                " if it goes around the others."
            )
        if problem:
            raise UserError(f"{offer.describe()}: {name!r} {problem}")
