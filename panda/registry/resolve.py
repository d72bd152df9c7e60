"""From what was written to what will run: components chosen, every value converted, its origin kept.

Precedence per key: default, then arch, then YAML, then flag. Every key has one owner, the core or
one chosen component.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from panda.registry.catalog import Catalog
from panda.registry.catalog import Offer
from panda.registry.components import Component
from panda.registry.errors import UserError
from panda.registry.errors import did_you_mean
from panda.registry.kinds import KINDS
from panda.registry.options import REQUIRED
from panda.registry.options import Given
from panda.registry.options import Option
from panda.registry.options import options_of

CHOSEN_BY_NAME = ("task", "optimizer", "lr_scheduler", "reader")
"""Kinds of which the option of the same name chooses one. Model and arch choose each other."""


@dataclass(frozen=True)
class Setting:
    """The value of one key, and how it came to have it."""

    key: str
    value: Any
    origin: str
    """``default``, ``arch llama-7b``, ``run.yaml:3`` or ``--learning_rate``."""
    owner: str
    """``run`` for a core option, else the component: ``optimizer adamw``."""


@dataclass(frozen=True)
class Chosen:
    """A component that the run named, with its options."""

    offer: Offer
    component: Component
    options: Any

    @property
    def label(self) -> str:
        return f"{self.component.kind} {self.component.name}"


@dataclass(frozen=True)
class Resolved:
    """A configuration in which every name is a component and every value has its type."""

    core: Any
    """An instance of the core options dataclass."""
    components: Mapping[str, Chosen]
    """By kind: task, model, optimizer, lr_scheduler, reader and, where one was named, arch."""
    plugins: tuple[Chosen, ...]
    """Lifecycle plugins that have a factory, in the order of activation."""
    settings: Mapping[str, Setting]
    """Every key, in the order of help."""

    @property
    def chosen(self) -> Iterator[Chosen]:
        yield from self.components.values()
        yield from self.plugins


def resolve(
    catalog: Catalog,
    core: type,
    given: Mapping[str, Given],
    *,
    default_plugins: tuple[str, ...] = (),
    renamed: Mapping[str, str] | None = None,
) -> Resolved:
    """Resolve ``given`` (flags already laid over YAML) against the core options and what is installed.

    ``renamed`` maps keys that panda does not have to what to write instead. Raises UserError, for
    all bad keys and values at once where that is possible.
    """
    core_options = options_of(core)
    core_values, problems = _convert_all(core_options, given)
    if problems:
        raise UserError("\n".join(problems))
    value_of = {key: core_values[key].value for key in core_options}
    origin_of = {key: setting.origin for key, setting in core_values.items() if setting.origin != "default"}

    offers = {kind: catalog.find(kind, value_of[kind], origin_of.get(kind, "")) for kind in CHOSEN_BY_NAME}
    arch_offer, model_offer = _find_model(catalog, value_of, origin_of)
    plugin_offers = [
        catalog.find("plugin", name, origin_of.get("plugins", ""))
        for name in dict.fromkeys(
            [name for name in default_plugins if name.lower() not in catalog.blocked] + list(value_of["plugins"])
        )
    ]

    loaded: dict[str, Component] = {}
    arch_values: dict[str, Any] = {}
    arch_component = None
    if arch_offer is not None:
        arch_component = _load(catalog, arch_offer)
        model_offer = model_offer or _model_of(catalog, arch_component, arch_offer)
    assert model_offer is not None
    offers = {"task": offers["task"], "model": model_offer, **offers}
    for kind, offer in offers.items():
        loaded[kind] = _load(catalog, offer)
    if arch_component is not None and arch_offer is not None:
        arch_values = _arch_values(arch_component, loaded["model"], arch_offer)

    plugins = [(offer, catalog.load(offer)) for offer in plugin_offers]
    owners = [(loaded[kind], offer) for kind, offer in offers.items()]
    owners += [(component, offer) for offer, component in plugins if component is not None]
    settings = dict(core_values)
    options: list[Any] = []
    used = set(core_options)
    shared = _shared_keys(core_options, [component for component, _ in owners])
    for component, _ in owners:
        own = options_of(component.options)
        mine: dict[str, Given] = {}
        for key in own:
            qualified = f"{component.kind}.{key}"
            if key in shared and key in given:
                others = " and ".join(f"`{label.split()[0]}.{key}` ({label})" for label in shared[key])
                problems.append(f"{given[key].origin}: {key!r} is an option of more than one: write {others}.")
            for spelling in (qualified, *(() if key in shared else (key,))):
                if spelling in given:
                    if key in mine:
                        problems.append(f"{given[spelling].origin}: {key!r} is also given at {mine[key].origin}.")
                    mine[key] = given[spelling]
            used |= {key, qualified}
        label = f"{component.kind} {component.name}"
        overrides = arch_values if component.kind == "model" else {}
        converted, found = _convert_all(own, mine, label, overrides, f"arch {arch_component.name}" if arch_component else "")
        problems += found
        for key, setting in converted.items():
            settings[f"{component.kind}.{key}" if key in shared else key] = setting
        options.append(None if found else component.options(**{k: s.value for k, s in converted.items()}))
    problems += [
        _unknown(catalog, key, given[key], settings, renamed or {}, [component for component, _ in owners])
        for key in given
        if key not in used
    ]
    if problems:
        raise UserError("\n".join(problems))

    chosen = [
        Chosen(offer, component, values) for (component, offer), values in zip(owners, options, strict=True)
    ]
    components = {item.component.kind: item for item in chosen if item.component.kind != "plugin"}
    if arch_component is not None and arch_offer is not None:
        components["arch"] = Chosen(arch_offer, arch_component, arch_component.options())
    return Resolved(
        core(**value_of),
        components,
        tuple(item for item in chosen if item.component.kind == "plugin"),
        settings,
    )


def _find_model(
    catalog: Catalog, value_of: Mapping[str, Any], origin_of: Mapping[str, str]
) -> tuple[Offer | None, Offer | None]:
    """The arch and the model that the run names. ``model`` may hold an arch, as PandaLLM's documentation writes it."""
    arch, model = value_of["arch"], value_of["model"]
    arch_offer = catalog.find("arch", arch, origin_of.get("arch", "")) if arch else None
    if model is None:
        if arch_offer is None:
            names = ", ".join(offer.name for offer in catalog.offers("arch"))
            raise UserError(f"no model: name one with `arch` (or `--arch`). Installed: {names}.")
        return arch_offer, None
    at = origin_of.get("model", "")
    name = model.rpartition(":")[2].lower()
    is_arch = any(offer.name.lower() == name for offer in catalog.offers("arch"))
    is_model = any(offer.name.lower() == name for offer in catalog.offers("model"))
    if is_arch and not is_model:
        model_as_arch = catalog.find("arch", model, at)
        if arch_offer is not None and arch_offer != model_as_arch:
            raise UserError(f"{at}: model {model!r} and arch {arch!r} are two archs. Give one.")
        return model_as_arch, None
    if not is_model and not is_arch:
        known = [offer.name for kind in ("arch", "model") for offer in catalog.offers(kind)]
        raise UserError(f"{at}: unknown model or arch {model!r}.{did_you_mean(model, known)} `panda list archs` shows them.")
    return arch_offer, catalog.find("model", model, at)


def _model_of(catalog: Catalog, arch: Component, offer: Offer) -> Offer:
    """The model of an arch. An arch and a model of one distribution belong together, whoever else has that name."""
    assert arch.model is not None
    same = [o for o in catalog.offers("model") if o.name.lower() == arch.model.lower()]
    beside = [o for o in same if o.distribution == offer.distribution]
    return beside[0] if beside else catalog.find("model", arch.model, arch.describe())


def _load(catalog: Catalog, offer: Offer) -> Component:
    component = catalog.load(offer)
    assert component is not None
    return component


def _arch_values(arch: Component, model: Component, offer: Offer) -> dict[str, Any]:
    if arch.model is None or arch.model.lower() not in {name.lower() for name in (model.name, *model.aliases)}:
        raise UserError(f"arch {arch.name!r} belongs to model {arch.model!r}, not to {model.name!r}.")
    values = arch.factory()
    known = options_of(model.options)
    if not isinstance(values, Mapping):
        raise UserError(f"{arch.describe()} returned {values!r}, not a mapping of options of {model.name!r}.")
    checked = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(
                f"{arch.describe()} sets {key!r}, which model {model.name!r} has not.{did_you_mean(key, known)}"
            )
        try:
            checked[key] = known[key].check(value)
        except ValueError as problem:
            raise UserError(f"{arch.describe()}: {key}: {value!r} is not {known[key].expects}. {problem}") from None
    return checked


def _convert_all(
    options: Mapping[str, Option],
    given: Mapping[str, Given],
    owner: str = "run",
    overrides: Mapping[str, Any] | None = None,
    overriding: str = "",
) -> tuple[dict[str, Setting], list[str]]:
    settings: dict[str, Setting] = {}
    problems: list[str] = []
    for key, option in options.items():
        if key in given:
            try:
                settings[key] = Setting(key, option.convert(given[key]), given[key].origin, owner)
            except UserError as problem:
                problems.append(str(problem))
        elif overrides and key in overrides:
            settings[key] = Setting(key, overrides[key], overriding, owner)
        elif option.default is REQUIRED:
            problems.append(f"{key}: {owner} needs a value: {option.expects}. {option.doc}")
        else:
            settings[key] = Setting(key, option.default, "default", owner)
    return settings, problems


def _shared_keys(core_options: Mapping[str, Option], components: list[Component]) -> dict[str, list[str]]:
    """Keys that several chosen components have: those are written with the kind before them."""
    owners: dict[str, list[str]] = {}
    for component in components:
        for key in options_of(component.options):
            if key in core_options:
                raise UserError(
                    f"{component.describe()} has an option {key!r}, which is one of panda's own. Rename it there."
                )
            owners.setdefault(key, []).append(f"{component.kind} {component.name}")
    return {key: labels for key, labels in owners.items() if len(labels) > 1}


def _unknown(
    catalog: Catalog,
    key: str,
    given: Given,
    settings: Mapping[str, Setting],
    renamed: Mapping[str, str],
    chosen: list[Component],
) -> str:
    """What to say of a key that nothing in this run takes."""
    if key in renamed:
        return f"{given.origin}: {key!r} is not what panda calls it: {renamed[key]}"
    bare = key.rpartition(".")[2]
    users = [
        f"{offer.kind} {offer.name}"
        for kind in KINDS
        for offer in catalog.offers(kind)
        if offer.declaration is not None and bare in offer.declaration.keys
    ]
    if users:
        kinds = {user.split()[0] for user in users}
        instead = ", ".join(f"{c.kind} {c.name}" for c in chosen if c.kind in kinds) or "none of these"
        return (
            f"{given.origin}: {key!r} is known, but nothing that this run chose uses it: it is an option of"
            f" {', '.join(users)}, and the run has {instead}. Leave it out, or choose what uses it."
        )
    hint = did_you_mean(key, settings)
    return (
        f"{given.origin}: unknown key {key!r}.{hint}"
        + ("" if hint else " `panda-train --help` lists the keys; one from a newer panda is unknown to this one.")
    )
