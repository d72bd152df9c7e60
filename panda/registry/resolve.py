"""Resolves a configuration: components are chosen, every value is converted, and its origin kept.

Precedence per key: default, then arch, then YAML, then flag. Every key has one owner, the core or
one chosen component.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from typing import Any

from panda.registry.catalog import Catalog
from panda.registry.choosing import CHOSEN_BY_NAME
from panda.registry.choosing import NAMING
from panda.registry.choosing import Choice
from panda.registry.choosing import choose
from panda.registry.choosing import load_component
from panda.registry.choosing import model_of
from panda.registry.choosing import named_by_options
from panda.registry.choosing import prefix
from panda.registry.components import Component
from panda.registry.components import NoOptions
from panda.registry.errors import UserError
from panda.registry.errors import did_you_mean
from panda.registry.hooks import has_hooks
from panda.registry.kinds import KINDS
from panda.registry.offers import Offer
from panda.registry.offers import made_by
from panda.registry.options import Given
from panda.registry.options import Option
from panda.registry.options import options_of
from panda.registry.settings import CORE
from panda.registry.settings import Setting
from panda.registry.settings import convert_options
from panda.registry.unknown_keys import unknown_key_messages


@dataclass(frozen=True)
class Chosen:
    """A component that the run named, with its options."""

    offer: Offer
    component: Component
    options: Any
    built: list[Any] = field(default_factory=list, repr=False, compare=False)
    """Those of the objects that ``build`` has made that have hooks. Copies of this share it."""

    @property
    def name(self) -> str:
        return self.component.name

    @property
    def label(self) -> str:
        return f"{self.component.kind} {self.component.name}"

    def attributed(self, part: str) -> AbstractContextManager[None]:
        """Goes around a call of ``part`` of this component, or of what it made: an exception names the distribution."""
        return self.offer.attributed(part)

    def build(self, context: Any, expected: Any) -> Any:
        """The product of the component's factory, given its options and ``context``.

        Raises UserError where it is not of the type ``expected``, or None.
        """
        with self.attributed("the factory"):
            built = self.component.factory(self.options, context)
        if built is None or not isinstance(built, expected):
            wanted = "an object" if expected is object else f"a {expected.__qualname__}"
            raise UserError(
                f"{self.component.describe()} returned {_shortened(built)}, and not {wanted}."
                f" This is a fault of {self.offer.describe()}."
            )
        if has_hooks(type(built)) and not any(built is each for each in self.built):
            self.built.append(built)
        if self.component.kind == "lr_scheduler":  # hooks, too, call a schedule
            return _attributed_schedule(built, self)
        if self.component.kind == "reader":  # tasks call it, and do not know where it is from
            made_by(self.offer, built)
        return built


@dataclass(frozen=True)
class Resolved:
    """A configuration in which every name is a component and every value has its type."""

    core: Any
    """An instance of the core options dataclass."""
    components: Mapping[str, Chosen]
    """By kind: task, model, optimizer, lr_scheduler, reader and, where one was named, arch."""
    named: tuple[Chosen, ...]
    """Components of kinds that packages add: those that options of others name, in that order."""
    plugins: tuple[Chosen, ...]
    """Lifecycle plugins that have a factory, in the order of activation."""
    hook_modules: tuple[Offer, ...]
    """Lifecycle plugins that are a module of hooks, without a factory."""
    settings: Mapping[str, Setting]
    """Every key, in the order of help."""

    @property
    def chosen(self) -> Iterator[Chosen]:
        yield from self.components.values()
        yield from self.named
        yield from self.plugins

    def key_of(self, chosen: Chosen, option: str) -> str:
        """The key of ``option`` of ``chosen`` among the settings: with a prefix where several components have it."""
        setting = self.settings.get(option)
        return option if setting and setting.owner == chosen.label else f"{prefix(chosen.component)}.{option}"

    def with_values(self, values: Mapping[str, Any], origin: str) -> Resolved:
        """This configuration with ``values`` for some keys, which came from ``origin``.

        The only way to change one: the core options, those of components and the settings stay in step. Raises
        UserError for a combination of values that a component refuses.
        """
        settings = dict(self.settings)
        changed: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            settings[key] = replace(settings[key], value=value, origin=origin)
            changed.setdefault(settings[key].owner, {})[key.rpartition(".")[2]] = value

        def followed(chosen: Chosen) -> Chosen:
            ours = changed.get(chosen.label)
            return replace(chosen, options=replace(chosen.options, **ours)) if ours else chosen

        return replace(
            self,
            core=replace(self.core, **changed.get(CORE, {})),
            components={kind: followed(chosen) for kind, chosen in self.components.items()},
            named=tuple(map(followed, self.named)),
            plugins=tuple(map(followed, self.plugins)),
            settings=settings,
        )


def resolve(
    catalog: Catalog,
    core: type,
    given: Mapping[str, Given],
    *,
    default_plugins: tuple[str, ...] = (),
    renamed: Mapping[str, str] | None = None,
) -> Resolved:
    """Resolve ``given`` (flags already laid over YAML) against the core options and what is installed.

    ``renamed`` maps keys that panda lacks to advice, and kinds whose name is one that other tools have. Raises
    UserError for all bad keys and values at once, where that is possible.
    """
    core_options = options_of(core)
    core_values, problems = convert_options(core_options, given)
    answered = [key for key in given if (key in (renamed or {}) or given[key].is_nested) and key not in core_options]
    answers = unknown_key_messages(catalog, answered, given, [], renamed or {}, [])
    if any(key not in core_values for key in NAMING):
        raise UserError("\n".join(problems + answers))
    try:
        choice = choose(catalog, core_values, default_plugins)
    except UserError as problem:
        problems += [str(problem), *_other_names(core_values, renamed or {}), *answers]
        raise UserError("\n".join(problems)) from None
    if "arch" not in choice.offers and "model" not in choice.offers:
        raise UserError("\n".join([*problems, *_without_model(catalog, given, core_options, renamed or {})]))
    named, unnamed = _load(catalog, choice, given)
    problems += unnamed
    options = _convert_all(named, given, core_options)
    known = [*core_options, *options.settings]
    components = [component for _, component in named.owners]
    unused = [key for key in given if key not in core_options and key not in options.used]
    problems += options.problems + unknown_key_messages(catalog, unused, given, known, renamed or {}, components)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))

    by_kind = {item.component.kind: item for item in options.chosen if item.component.kind in KINDS}
    by_kind.pop("plugin", None)
    return Resolved(
        core(**{key: core_values[key].value for key in core_options}),
        by_kind | ({"arch": named.arch} if named.arch else {}),
        tuple(item for item in options.chosen if item.component.kind not in KINDS),
        tuple(item for item in options.chosen if item.component.kind == "plugin"),
        named.hook_modules,
        core_values | options.settings,
    )


def _other_names(values: Mapping[str, Setting], renamed: Mapping[str, str]) -> list[str]:
    """What names of components that another tool has are in panda."""
    return [
        f"{values[kind].origin}: {values[kind].value!r} is another tool's name: {renamed[kind]}"
        for kind in CHOSEN_BY_NAME
        if kind in renamed
    ]


def _without_model(
    catalog: Catalog, given: Mapping[str, Given], core_options: Mapping[str, Option], renamed: Mapping[str, str]
) -> list[str]:
    """The problems of a run that names no model: perhaps the key that does is misspelt."""
    names = ", ".join(dict.fromkeys(offer.name for offer in catalog.offers("arch")))
    missing = (
        "no model: name one with `arch` (or `--arch`), a checkpoint with `ckpt_path`, or a file that does with"
        " `--config`; that of a run is"
        f" RUN/config.yaml. Installed: {names}."
    )
    # Keys of components that are not chosen yet are known, but not these.
    suspects = [key for key in given if key not in core_options]
    messages = unknown_key_messages(catalog, suspects, given, [*core_options], renamed, [])
    return [*(text for text in messages if "is known, but" not in text), missing]


@dataclass(frozen=True)
class _Named:
    """The components that a run names, imported."""

    arch: Chosen | None
    owners: list[tuple[Offer, Component]]
    """Those that have options, in the order of help: task, model, the other kinds, plugins, what options name."""
    hook_modules: tuple[Offer, ...]

    @property
    def model(self) -> Component:
        return next(component for _, component in self.owners if component.kind == "model")


def _load(catalog: Catalog, choice: Choice, given: Mapping[str, Given]) -> tuple[_Named, list[str]]:
    """The components of ``choice``, those that their options name, and the problems of these."""
    offers = dict(choice.offers)
    arch_offer = offers.pop("arch", None)
    arch = Chosen(arch_offer, load_component(catalog, arch_offer), NoOptions()) if arch_offer else None
    if arch_offer and "model" not in offers:
        offers["model"] = model_of(catalog, arch_offer)
    offers = {"task": offers["task"], "model": offers["model"], **offers}
    owners = [(offer, load_component(catalog, offer)) for offer in offers.values()]
    plugins = [(offer, catalog.load(offer)) for offer in choice.plugins]
    owners += [(offer, component) for offer, component in plugins if component is not None]
    named, problems = named_by_options(catalog, owners, given)
    modules = tuple(offer for offer, component in plugins if component is None)
    return _Named(arch, [*owners, *named], modules), problems


@dataclass
class _Converted:
    """The options of the components that a run names."""

    settings: dict[str, Setting]
    chosen: list[Chosen]
    used: set[str]
    """Every key that some component answers to."""
    problems: list[str]


def _convert_all(named: _Named, given: Mapping[str, Given], core_options: Mapping[str, Option]) -> _Converted:
    arch_values = _arch_values(named.arch, named.model) if named.arch else {}
    arch_label = named.arch.label if named.arch else ""
    shared = _shared_keys(core_options, [component for _, component in named.owners])
    done = _Converted({}, [], set(), [])
    for offer, component in named.owners:
        mine, known, found = _given_to(component, given, shared)
        done.used |= known
        overrides = arch_values if component.kind == "model" else {}
        owner = f"{component.kind} {component.name}"
        converted, more = convert_options(options_of(component.options), mine, owner, overrides, arch_label)
        done.problems += found + more
        done.settings |= {_written(component, key, shared): setting for key, setting in converted.items()}
        if not more:
            values = {key: setting.value for key, setting in converted.items()}
            try:
                with offer.attributed("the options"):
                    done.chosen.append(Chosen(offer, component, component.options(**values)))
            except UserError as problem:  # of __post_init__: a combination that is refused
                done.problems.append(str(problem))
    return done


def _arch_values(chosen: Chosen, model: Component) -> dict[str, Any]:
    """The options of ``model`` that the arch ``chosen`` sets, each value checked."""
    arch = chosen.component
    of_model = (arch.model or "").rpartition(":")[2]
    if of_model.lower() not in {name.lower() for name in (model.name, *model.aliases)}:
        raise UserError(
            f"arch {arch.name!r} belongs to model {of_model!r}, not to {model.name!r}: leave `model` out, or name an"
            f" arch of {model.name!r}."
        )
    with chosen.attributed("the factory"):
        values = arch.factory()
    known = options_of(model.options)
    if not isinstance(values, Mapping):
        raise UserError(
            f"{arch.describe()} returned {values!r}, not a mapping of options of {model.name!r}. This is a fault of"
            f" {chosen.offer.describe()}."
        )
    checked = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(
                f"{arch.describe()} sets {key!r}, which model {model.name!r} lacks.{did_you_mean(key, known)}"
            )
        try:
            checked[key] = known[key].check(value)
        except ValueError as problem:
            raise UserError(f"{arch.describe()}: {key}: {value!r} is not {known[key].expects}. {problem}") from None
    return checked


def _given_to(
    component: Component, given: Mapping[str, Given], shared: Mapping[str, list[Component]]
) -> tuple[dict[str, Given], set[str], list[str]]:
    """The values given for the options of ``component``, every key that it answers to, and the problems."""
    mine: dict[str, Given] = {}
    known: set[str] = set()
    problems: list[str] = []
    for key in options_of(component.options):
        qualified = f"{prefix(component)}.{key}"
        known |= {key, qualified}
        if key in shared and key in given:
            others = " and ".join(f"`{prefix(c)}.{key}` ({c.kind} {c.name})" for c in shared[key])
            problems.append(f"{given[key].origin}: {key!r} is an option of more than one: write {others}.")
        for spelling in (qualified,) if key in shared else (qualified, key):
            if spelling in given:
                if key in mine:
                    problems.append(f"{given[spelling].origin}: {key!r} is also given at {mine[key].origin}.")
                mine[key] = given[spelling]
    return mine, known, problems


def _written(component: Component, key: str, shared: Mapping[str, list[Component]]) -> str:
    """How ``key`` of ``component`` is written in this run."""
    return f"{prefix(component)}.{key}" if key in shared else key


def _attributed_schedule(schedule: Callable[[int], float], chosen: Chosen) -> Callable[[int], float]:
    def factor(completed_steps: int) -> float:
        with chosen.attributed("the schedule"):
            return schedule(completed_steps)

    return factor


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__qualname__}"


def _shared_keys(core_options: Mapping[str, Option], components: list[Component]) -> dict[str, list[Component]]:
    """Keys that several chosen components have: those are written with a prefix."""
    owners: dict[str, list[Component]] = {}
    for component in components:
        for key in options_of(component.options):
            if key in core_options:
                raise UserError(
                    f"{component.describe()} has an option {key!r}, which is one of panda's own. Rename it there."
                )
            owners.setdefault(key, []).append(component)
    return {key: having for key, having in owners.items() if len(having) > 1}
