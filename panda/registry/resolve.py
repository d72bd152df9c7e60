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
from dataclasses import replace
from typing import Any

from panda.registry.catalog import Catalog
from panda.registry.components import Component
from panda.registry.components import NoOptions
from panda.registry.errors import UserError
from panda.registry.errors import did_you_mean
from panda.registry.kinds import KINDS
from panda.registry.location import Location
from panda.registry.offers import OWN_DISTRIBUTION
from panda.registry.offers import Offer
from panda.registry.offers import made_by
from panda.registry.offers import with_readable_source
from panda.registry.options import REQUIRED
from panda.registry.options import Given
from panda.registry.options import Option
from panda.registry.options import options_of

CHOSEN_BY_NAME = ("task", "optimizer", "lr_scheduler", "reader")
"""Kinds of which the option of the same name chooses one. Model and arch choose each other."""

BLOCK = "no:"
"""``no:NAME`` among the plugins leaves one out, as ``-p no:NAME`` does."""

CORE = "run"
"""Owner of the core options."""

NAMING = (*CHOSEN_BY_NAME, "arch", "model", "plugins")
"""Core options that hold names of components."""


@dataclass(frozen=True)
class Setting:
    """The value of one key, and where it came from."""

    key: str
    value: Any
    origin: str
    """``default``, ``arch llama-7b``, ``run.yaml:3`` or ``--learning_rate``."""
    owner: str
    """``CORE`` for a core option, else the label of the component: ``optimizer adamw``."""
    location: Location | None = None
    """The mark of a path; None for other options."""


@dataclass(frozen=True)
class Choice:
    """The offers that a run names, none of them imported."""

    offers: Mapping[str, Offer]
    """By kind; of arch and model those that are named."""
    plugins: tuple[Offer, ...]
    """In the order of activation."""


@dataclass(frozen=True)
class Chosen:
    """A component that the run named, with its options."""

    offer: Offer
    component: Component
    options: Any

    @property
    def label(self) -> str:
        return f"{self.component.kind} {self.component.name}"

    def attributed(self, part: str) -> AbstractContextManager[None]:
        """Goes around a call of ``part`` of this component, or of what it made: an exception names the distribution."""
        return self.offer.attributed(part)

    def build(self, context: Any, expected: Any) -> Any:
        """The product of the component's factory, given its options and ``context``.

        Raises UserError where it is not of the type ``expected``.
        """
        with self.attributed("the factory"):
            built = self.component.factory(self.options, context)
        if not isinstance(built, expected):
            raise UserError(
                f"{self.component.describe()} returned {_shortened(built)}, and not a {expected.__qualname__}."
                f" This is a fault of {self.offer.describe()}."
            )
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
    plugins: tuple[Chosen, ...]
    """Lifecycle plugins that have a factory, in the order of activation."""
    hook_modules: tuple[Offer, ...]
    """Lifecycle plugins that are a module of hooks, without a factory."""
    settings: Mapping[str, Setting]
    """Every key, in the order of help."""

    @property
    def chosen(self) -> Iterator[Chosen]:
        yield from self.components.values()
        yield from self.plugins

    def key_of(self, chosen: Chosen, option: str) -> str:
        """The key of ``option`` of ``chosen`` among the settings: with a prefix where several components have it."""
        setting = self.settings.get(option)
        return option if setting and setting.owner == chosen.label else f"{_prefix(chosen.component)}.{option}"

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

    ``renamed`` maps keys that panda lacks to advice. Raises UserError for all bad keys and values at once,
    where that is possible.
    """
    core_options = options_of(core)
    core_values, problems = convert_options(core_options, given)
    if any(key not in core_values for key in NAMING):
        raise UserError("\n".join(problems))
    try:
        choice = choose(catalog, core_values, default_plugins)
    except UserError as problem:
        raise UserError("\n".join([*problems, str(problem)])) from None
    offers = dict(choice.offers)
    arch_offer = offers.pop("arch", None)
    model_offer = offers.get("model")
    if arch_offer is None and model_offer is None:
        names = ", ".join(dict.fromkeys(offer.name for offer in catalog.offers("arch")))
        problems.append(
            "no model: name one with `arch` (or `--arch`), or a file that does with `--config`; that of a run is"
            f" RUN/config.yaml. Installed: {names}."
        )
        # Perhaps it is misspelt. Keys of components that are not chosen yet are known, but not these.
        suspects = [key for key in given if key not in core_values]
        problems += [
            text
            for text in _unknown(catalog, suspects, given, [*core_options], renamed or {}, [])
            if "unknown key" in text
        ]
        raise UserError("\n".join(problems))

    arch = None
    if arch_offer is not None:
        arch = Chosen(arch_offer, _load(catalog, arch_offer), NoOptions())
        model_offer = model_offer or model_of(catalog, arch_offer)
    assert model_offer is not None
    offers = {"task": offers["task"], "model": model_offer, **offers}
    owners = [(offer, _load(catalog, offer)) for offer in offers.values()]
    arch_values = _arch_values(arch, owners[1][1]) if arch else {}
    plugins = [(offer, catalog.load(offer)) for offer in choice.plugins]
    owners += [(offer, component) for offer, component in plugins if component is not None]

    settings = dict(core_values)
    chosen: list[Chosen] = []
    used = set(core_options)
    shared = _shared_keys(core_options, [component for _, component in owners])
    for offer, component in owners:
        mine, known, found = _given_to(component, given, shared)
        used |= known
        converted, more = convert_options(
            options_of(component.options),
            mine,
            f"{component.kind} {component.name}",
            arch_values if component.kind == "model" else {},
            arch.label if arch else "",
        )
        problems += found + more
        settings |= {_written(component, key, shared): setting for key, setting in converted.items()}
        if not more:
            values = {key: setting.value for key, setting in converted.items()}
            try:
                with offer.attributed("the options"):
                    chosen.append(Chosen(offer, component, component.options(**values)))
            except UserError as problem:  # of __post_init__: a combination that is refused
                problems.append(str(problem))
    known_keys = [*core_options, *settings]
    components = [component for _, component in owners]
    unused = [key for key in given if key not in used]
    problems += _unknown(catalog, unused, given, known_keys, renamed or {}, components)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))

    by_kind = {item.component.kind: item for item in chosen if item.component.kind != "plugin"}
    resolved = Resolved(
        core(**{key: core_values[key].value for key in core_options}),
        by_kind | ({"arch": arch} if arch else {}),
        tuple(item for item in chosen if item.component.kind == "plugin"),
        tuple(offer for offer, component in plugins if component is None),
        settings,
    )
    # What the run directory records has to mean the same when it is named in a file.
    ambiguous = {
        kind: choice.offers[kind].qualified
        for kind in CHOSEN_BY_NAME
        if settings[kind].origin == "default" and len(catalog.matches(kind, settings[kind].value)) > 1
    }
    return resolved.with_values(ambiguous, "default")


def choose(catalog: Catalog, settings: Mapping[str, Setting], default_plugins: tuple[str, ...] = ()) -> Choice:
    """The components that the run names, found and not imported. Raises UserError for all unknown names at once."""
    problems: list[str] = []
    offers: dict[str, Offer] = {}
    plugins: list[Offer] = []
    for kind in CHOSEN_BY_NAME:
        setting = settings[kind]
        try:
            if setting.origin == "default":
                offers[kind] = catalog.find(kind, _own(setting.value))
            else:
                offers[kind] = catalog.find(kind, setting.value, setting.origin)
        except UserError as problem:
            problems.append(str(problem))
    try:
        offers.update(_find_model(catalog, settings["arch"], settings["model"]))
    except UserError as problem:
        problems.append(str(problem))
    for name in default_plugins:
        matches = catalog.matches("plugin", _own(name))
        if not matches or not all(map(catalog.is_blocked, matches)):
            plugins.append(catalog.find("plugin", _own(name)))
    for name in settings["plugins"].value:
        matches = catalog.matches("plugin", name)
        if name.startswith(BLOCK) or (matches and all(map(catalog.is_blocked, matches))):
            continue
        try:
            plugins.append(catalog.find("plugin", name, settings["plugins"].origin))
        except UserError as problem:
            problems.append(str(problem))
    if problems:
        raise UserError("\n".join(problems))
    return Choice(offers, tuple(dict.fromkeys(plugins)))


def _own(name: str) -> str:
    """A default means panda's own component, even where an installed package has one of the same name."""
    return name if ":" in name else f"{OWN_DISTRIBUTION}:{name}"


def _find_model(catalog: Catalog, arch: Setting, model: Setting) -> dict[str, Offer]:
    """The arch and the model that the run names. ``model`` may hold an arch, as PandaLLM's documentation writes it."""
    found = {"arch": catalog.find("arch", arch.value, arch.origin)} if arch.value else {}
    if not model.value:
        return found
    if catalog.matches("model", model.value):
        return found | {"model": catalog.find("model", model.value, model.origin)}
    if catalog.matches("arch", model.value):
        model_as_arch = catalog.find("arch", model.value, model.origin)
        if found and found["arch"] != model_as_arch:
            raise UserError(
                f"{model.origin}: model {model.value!r} is an arch, and arch {arch.value!r} ({arch.origin}) another."
                " Give one of them."
            )
        return {"arch": model_as_arch}
    known = [name for kind in ("arch", "model") for name in catalog.spellings(kind, model.value)]
    raise UserError(
        f"{model.origin}: unknown model or arch {model.value!r}.{did_you_mean(model.value, known)}"
        " `panda list archs` and `panda list models` show what is installed."
    )


def model_of(catalog: Catalog, offer: Offer) -> Offer:
    """The model of the arch ``offer``: that of the same distribution, if it has one, whoever else has the name."""
    arch = _load(catalog, offer)
    assert arch.model is not None
    beside = f"{offer.distribution}:{arch.model}"
    if ":" not in arch.model and catalog.matches("model", beside):
        return catalog.find("model", beside, arch.describe())
    return catalog.find("model", arch.model, arch.describe())


def _load(catalog: Catalog, offer: Offer) -> Component:
    component = catalog.load(offer)
    assert component is not None
    return component


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
        raise UserError(f"{arch.describe()} returned {values!r}, not a mapping of options of {model.name!r}.")
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


def convert_options(
    options: Mapping[str, Option],
    given: Mapping[str, Given],
    owner: str = CORE,
    overrides: Mapping[str, Any] | None = None,
    overriding: str = "",
) -> tuple[dict[str, Setting], list[str]]:
    """The value of each of ``options``, and the problems of those that have none."""
    settings: dict[str, Setting] = {}
    problems: list[str] = []
    for key, option in options.items():
        if key in given:
            try:
                settings[key] = Setting(key, option.convert(given[key]), given[key].origin, owner, option.location)
            except UserError as problem:
                problems.append(str(problem))
        elif overrides and key in overrides:
            settings[key] = Setting(key, overrides[key], overriding, owner, option.location)
        elif option.default is REQUIRED:
            problems.append(f"{key}: {owner} needs a value: {option.expects}. {option.doc}")
        else:
            settings[key] = Setting(key, option.default, "default", owner, option.location)
    return settings, problems


def _given_to(
    component: Component, given: Mapping[str, Given], shared: Mapping[str, list[Component]]
) -> tuple[dict[str, Given], set[str], list[str]]:
    """The values given for the options of ``component``, every key that it answers to, and the problems."""
    mine: dict[str, Given] = {}
    known: set[str] = set()
    problems: list[str] = []
    for key in options_of(component.options):
        qualified = f"{_prefix(component)}.{key}"
        known |= {key, qualified}
        if key in shared and key in given:
            others = " and ".join(f"`{_prefix(c)}.{key}` ({c.kind} {c.name})" for c in shared[key])
            problems.append(f"{given[key].origin}: {key!r} is an option of more than one: write {others}.")
        for spelling in (qualified,) if key in shared else (qualified, key):
            if spelling in given:
                if key in mine:
                    problems.append(f"{given[spelling].origin}: {key!r} is also given at {mine[key].origin}.")
                mine[key] = given[spelling]
    return mine, known, problems


def _written(component: Component, key: str, shared: Mapping[str, list[Component]]) -> str:
    """How ``key`` of ``component`` is written in this run."""
    return f"{_prefix(component)}.{key}" if key in shared else key


def _attributed_schedule(schedule: Callable[[int], float], chosen: Chosen) -> Callable[[int], float]:
    def factor(completed_steps: int) -> float:
        with chosen.attributed("the schedule"):
            return schedule(completed_steps)

    return factor


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__qualname__}"


def _prefix(component: Component) -> str:
    """The prefix of a key that several components have: the kind, of which a run has one, or a plugin's name."""
    return component.name.replace("-", "_") if component.kind == "plugin" else component.kind


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


def _unknown(
    catalog: Catalog,
    keys: list[str],
    given: Mapping[str, Given],
    known: list[str],
    renamed: Mapping[str, str],
    chosen: list[Component],
) -> list[str]:
    """A message for each of ``keys``, which nothing in this run takes."""
    if not keys:
        return []
    offers = [offer for kind in KINDS for offer in catalog.offers(kind)]
    readable = with_readable_source(offers)
    unread = len({offer.module for offer in offers} - {offer.module for offer in readable})
    declared: dict[str, list[str]] = {}
    for offer in readable:
        for key in offer.declaration.keys if offer.declaration else ():
            declared.setdefault(key, []).append(f"{offer.kind} {offer.name}")

    def message(key: str) -> str:
        at = given[key].origin
        if key in renamed:
            return f"{at}: {key!r} is not what panda calls it: {renamed[key]}"
        users = declared.get(key.rpartition(".")[2])
        if users:
            kinds = {user.split()[0] for user in users}
            instead = ", ".join(f"{c.kind} {c.name}" for c in chosen if c.kind in kinds) or "none of these"
            return (
                f"{at}: {key!r} is known, but nothing that this run chose uses it: it is an option of"
                f" {', '.join(users)}, and the run has {instead}. Leave it out, or choose what uses it."
            )
        hint = did_you_mean(key, known)
        if not hint and (hint := did_you_mean(key, declared)):
            hint += " That is an option of a component that this run did not choose."
        hint = hint or " `panda-train --help` lists the keys; one from a newer panda is unknown to this one."
        others = f" Options of {unread:,} modules of other packages were not looked through." if unread else ""
        return f"{at}: unknown key {key!r}.{hint}{others}"

    return [message(key) for key in keys]
