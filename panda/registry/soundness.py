"""What is wrong with a component before it is called: its options, and how its factory can be called."""

from __future__ import annotations

import inspect
from typing import Any

from panda.registry.components import Component
from panda.registry.errors import UserError
from panda.registry.offers import Offer
from panda.registry.options import REQUIRED
from panda.registry.options import options_of

ARGUMENTS = {"arch": (), "kind": None}
"""What factories are called with, where that is not options and a context; None for what is not called."""


def refuse_unsound(component: Component, offer: Offer) -> None:
    """Raise UserError where the options or the factory of ``component``, which came with ``offer``, cannot be used."""
    where = f"{offer.describe()}: {component.describe()}"
    try:
        options = options_of(component.options)
    except Exception as problem:  # a type that no text converts to, or that names what is not imported
        raise UserError(
            f"{where}: its options cannot be used: {problem}. Mend {component.options.__qualname__}."
        ) from problem
    for key, option in options.items():
        try:
            is_sound = option.default is REQUIRED or option.check(option.default) == option.default
        except ValueError:
            is_sound = False
        except Exception as problem:  # bounds of another type, a pattern that is none
            raise UserError(
                f"{where}: its options cannot be used: the bounds of {key!r} do not fit its type: {problem}. Give"
                " others in `Meta`."
            ) from problem
        if not is_sound:
            raise UserError(
                f"{where}: its options cannot be used: the default of {key!r}, {option.default!r}, is not"
                f" {option.expects}. Give a default that is, or write `| None` after its type."
            )
    _refuse_uncallable(component, where)


def _refuse_uncallable(component: Component, where: str) -> None:
    given: tuple[str, ...] | None = ARGUMENTS.get(component.kind, ("options", "context"))
    factory: Any = component.factory
    if given is None:
        return
    called = f"called as `{getattr(factory, '__name__', 'factory')}({', '.join(given)})`"
    if inspect.iscoroutinefunction(factory) or inspect.isgeneratorfunction(factory):
        how = "async" if inspect.iscoroutinefunction(factory) else "a generator"
        raise UserError(f"{where}: its factory is {how}, and is {called}. Write a plain `def` that returns the object.")
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # of a builtin
        return
    try:
        signature.bind(*given)
    except TypeError as problem:
        raise UserError(
            f"{where}: its factory is {called}, and takes {signature}: {problem}. Let it take these."
        ) from None
