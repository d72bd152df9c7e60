"""The record that a decorator makes: a component is a factory and a frozen dataclass of options."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import is_dataclass
from functools import cached_property
from typing import Any
from typing import TypeVar

from panda.registry.errors import UserError

Factory = TypeVar("Factory", bound=Callable[..., Any])

NEEDS = {
    "nothing": "nothing of whole parameters",
    "norms": "norms of whole parameters",
    "parameters": "whole parameters",
}
"""What an optimizer may declare that it ``needs``, and how messages say it."""


@dataclass(frozen=True)
class NoOptions:
    """For a component without options."""


@dataclass(frozen=True)
class Component:
    """A registered factory and its description. Made by the ``register_*`` decorators."""

    kind: str
    name: str
    aliases: tuple[str, ...]
    factory: Callable[..., Any]
    module: str
    """The module that registered it, which need not be the factory's: a plugin may register another package's code."""
    options: type
    """The frozen dataclass whose fields are this component's keys and flags."""
    model: str | None = None
    """Archs only: the model whose options the arch sets."""
    needs: str = "nothing"
    """Optimizers only: what they have to know of whole parameters, of which a rank may hold parts: one of ``NEEDS``."""

    @property
    def doc(self) -> str:
        return inspect.cleandoc(self.factory.__doc__ or "")

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return self.doc.partition("\n")[0]

    @cached_property
    def source(self) -> tuple[str, int]:
        """File and line of the factory, also where it is a class, for which Python parses the file."""
        code = getattr(inspect.unwrap(self.factory), "__code__", None)
        if code is not None:
            return code.co_filename, code.co_firstlineno
        try:
            return inspect.getsourcefile(self.factory) or self.module, inspect.getsourcelines(self.factory)[1]
        except (OSError, TypeError):  # of a class in a notebook Python does not know the cell, but its functions do
            codes = [getattr(function, "__code__", None) for function in vars(self.factory).values()]
            known = [code for code in codes if code is not None and not code.co_filename.startswith("<")]
            return (known[0].co_filename, known[0].co_firstlineno) if known else (self.module, 0)

    def describe(self) -> str:
        file, line = self.source
        return f"{self.kind} {self.name!r} at {file}:{line}"


_recorded: dict[tuple[str, str, str], Component] = {}

_by_panda: set[tuple[str, str, str]] = set()
"""Those of ``_recorded`` that were registered while panda imported a module that a run named."""

_importing = 0


@contextmanager
def importing() -> Iterator[None]:
    """Goes around an import of panda's own: what is registered meanwhile is not of the process that called panda."""
    global _importing
    _importing += 1
    try:
        yield
    finally:
        _importing -= 1


def registered_in_process() -> list[tuple[str, Component]]:
    """What was registered while panda imported nothing, as in a script or a notebook: names in small letters."""
    return [(key[1], component) for key, component in _recorded.items() if key not in _by_panda]


def forget(modules: Collection[str]) -> None:
    """Forget what ``modules`` registered: they will be imported again."""
    for key in [key for key in _recorded if key[2] in modules]:
        del _recorded[key]


def recorded(kind: str, name: str, module: str) -> Component | None:
    """The component that ``module`` registered under ``name`` (in any case), if it did."""
    return _recorded.get((kind, name.lower(), module))


def recorded_names(kind: str, module: str) -> list[str]:
    """Every name of ``kind`` that ``module`` registered."""
    return [component.name for (k, _, m), component in _recorded.items() if (k, m) == (kind, module)]


def _record(component: Component) -> None:
    options: Any = component.options
    if not (isinstance(options, type) and is_dataclass(options) and options.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise UserError(
            f"{component.describe()}: options must be a frozen dataclass, not {options!r}. Write"
            " `@dataclass(frozen=True)` above the class, and give the class."
        )
    for name in (component.name, *component.aliases):
        if ":" in name or name != name.strip() or not name:
            raise UserError(
                f"{component.describe()}: a name must not be empty, contain ':', or begin or end with space: {name!r}."
            )
        key = (component.kind, name.lower(), component.module)
        before = _recorded.get(key)
        # A module that is reloaded, or a notebook cell that runs again, registers the same thing
        # twice: same file, same qualified name. Anything else is two things under one name.
        if before is not None and _identity(before) != _identity(component):
            raise UserError(
                f"two components of one name: {before.describe()} and {component.describe()}. Rename one of them."
            )
        _recorded[key] = component
        if _importing:
            _by_panda.add(key)
        else:
            _by_panda.discard(key)


def _identity(component: Component) -> tuple[str, str]:
    factory, file = component.factory, component.source[0]
    # The file of a notebook's cell is another one each time that the cell is edited, and none of them exists.
    return file if os.path.exists(file) else "", getattr(factory, "__qualname__", repr(factory))


def _register(
    kind: str,
    name: str,
    options: type,
    aliases: tuple[str, ...],
    model: str | None = None,
    needs: str = "nothing",
) -> Callable[[Factory], Factory]:
    if not isinstance(name, str):  # `@register_model` without the call, for one
        raise UserError(f'a {kind} is registered under {name!r}, which is no name. Write `@register_{kind}("NAME")`.')
    if isinstance(aliases, str):
        raise UserError(f"{kind} {name!r}: aliases must be a tuple of names, not the text {aliases!r}.")
    module = sys._getframe(2).f_globals.get("__name__", "?")  # whoever called register_KIND

    def decorate(factory: Factory) -> Factory:
        _record(Component(kind, name, tuple(aliases), factory, module, options, model, needs))
        return factory

    return decorate


def register_task(
    name: str, *, options: type = NoOptions, aliases: tuple[str, ...] = ()
) -> Callable[[Factory], Factory]:
    """Register ``factory(options, TaskContext) -> panda.tasks.task.Task``.

    As with each ``register_KIND``: ``name`` and ``aliases`` are what configurations write, in any case; ``options`` is
    a frozen dataclass whose fields are the keys and flags of the component. The decorator returns the factory. Raises
    UserError for what is no name, and where another factory has registered it.
    """
    return _register("task", name, options, aliases)


def register_model(
    name: str, *, options: type = NoOptions, aliases: tuple[str, ...] = ()
) -> Callable[[Factory], Factory]:
    """Register ``factory(options, ModelContext) -> torch.nn.Module``, causal; ``panda.models`` has shapes and types.

    Layers named with a number, ``layers.0``, are updated one at a time, which saves memory.
    """
    return _register("model", name, options, aliases)


def register_arch(name: str, *, model: str, aliases: tuple[str, ...] = ()) -> Callable[[Factory], Factory]:
    """Register ``factory() -> dict``: values for options of ``model``, a model's name. It has no options of its own."""
    return _register("arch", name, NoOptions, aliases, model)


def register_optimizer(
    name: str, *, options: type = NoOptions, aliases: tuple[str, ...] = (), needs: str = "nothing"
) -> Callable[[Factory], Factory]:
    """Register ``factory(options, OptimizerContext) -> torch.optim.Optimizer``.

    Under ZeRO it is given flat slices of parameters, so it has to work element by element, or to have a
    method ``bind`` (``OptimizerContext`` says when it is called) that learns where each parameter lies.
    ``needs`` declares the latter: "norms" of whole parameters, or whole "parameters". What cannot give it that is
    refused before anything is built.
    """
    if needs not in NEEDS:
        raise UserError(f"optimizer {name!r}: needs is {needs!r}; expected {', '.join(map(repr, NEEDS))}.")
    return _register("optimizer", name, options, aliases, needs=needs)


def register_lr_scheduler(
    name: str, *, options: type = NoOptions, aliases: tuple[str, ...] = ()
) -> Callable[[Factory], Factory]:
    """Register ``factory(options, LRSchedulerContext) -> Callable[[int], float]``.

    What it returns maps the number of completed optimizer steps to a factor of the peak rate, finite and at least 0.
    """
    return _register("lr_scheduler", name, options, aliases)


def register_reader(
    name: str, *, options: type = NoOptions, aliases: tuple[str, ...] = ()
) -> Callable[[Factory], Factory]:
    """Register ``factory(options, ReaderContext) -> panda.data.Reader``: files to rows, by the endings it names."""
    return _register("reader", name, options, aliases)


def register_plugin(
    name: str, *, options: type = NoOptions, aliases: tuple[str, ...] = ()
) -> Callable[[Factory], Factory]:
    """Register ``factory(options, PluginContext) -> object`` whose methods are hook implementations.

    A lifecycle plugin without state needs no factory: ``@hookimpl`` functions at the top of
    its module are enough.
    """
    return _register("plugin", name, options, aliases)


def register_kind(name: str) -> Callable[[Factory], Factory]:
    """Register a kind of component: a class or a protocol whose docstring says what factories of this kind make.

    ``decorator_for`` makes the decorator that registers components of it, and a key marked with ``Names`` chooses
    them. Its name is a word in small letters; its plural has an ``s`` more.
    """
    return _register("kind", name, NoOptions, ())


def decorator_for(kind: str) -> Callable[..., Callable[[Factory], Factory]]:
    """The decorator that registers components of a ``kind`` that a package adds.

    It has to be called ``register_KIND``, since ``panda list`` reads it in the source, and is used as
    ``@register_KIND("name", options=..., aliases=...)`` on ``factory(options, context)``. What adds the kind decides
    what the context is.
    """

    def register(
        name: str, *, options: type = NoOptions, aliases: tuple[str, ...] = ()
    ) -> Callable[[Factory], Factory]:
        return _register(kind, name, options, aliases)

    return register
