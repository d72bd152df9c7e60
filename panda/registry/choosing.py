"""Which components a run names: found, and not imported."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from panda.registry.catalog import Catalog
from panda.registry.components import Component
from panda.registry.errors import UserError
from panda.registry.errors import did_you_mean
from panda.registry.kinds import KINDS
from panda.registry.offers import OWN_DISTRIBUTION
from panda.registry.offers import Offer
from panda.registry.offers import strays
from panda.registry.options import REQUIRED
from panda.registry.options import Given
from panda.registry.options import Option
from panda.registry.options import options_of
from panda.registry.settings import Setting

CHOSEN_BY_NAME = ("task", "optimizer", "lr_scheduler", "reader")
"""Kinds of which the option of the same name chooses one. Model and arch choose each other."""

BLOCK = "no:"
"""``no:NAME`` among the plugins leaves one out, as ``-p no:NAME`` does."""


NAMING = (*CHOSEN_BY_NAME, "arch", "model", "plugins")
"""Core options that hold names of components."""


@dataclass(frozen=True)
class Choice:
    """The offers that a run names, none of them imported."""

    offers: Mapping[str, Offer]
    """By kind; of arch and model those that are named."""
    plugins: tuple[Offer, ...]
    """In the order of activation."""
    lasting: Mapping[str, Any]
    """The values of the options that name them, in spellings that mean the same whatever else is installed."""


def choose(catalog: Catalog, settings: Mapping[str, Setting], default_plugins: tuple[str, ...] = ()) -> Choice:
    """The components that the run names, found and not imported. Raises UserError for all unknown names at once."""
    problems: list[str] = []
    offers: dict[str, Offer] = {}
    plugins: list[Offer] = []
    lasting: dict[str, Any] = {}
    for kind in CHOSEN_BY_NAME:
        setting = settings[kind]
        try:
            if setting.origin == "default":
                offers[kind] = catalog.find(kind, _own(setting.value))
            else:
                offers[kind] = catalog.find(kind, setting.value, setting.origin)
                lasting[kind] = lasting_name(offers[kind], setting.value)
        except UserError as problem:
            problems.append(str(problem))
    try:
        found, names = find_model(catalog, settings["arch"], settings["model"])
        offers.update(found)
        lasting.update(names)
    except UserError as problem:
        problems.append(str(problem))
    for name in default_plugins:
        if not catalog.blocks_plugin(_own(name)):
            plugins.append(catalog.find("plugin", _own(name)))
    items = []
    for name in settings["plugins"].value:
        items.append(name)
        if name.startswith(BLOCK) or catalog.blocks_plugin(name):
            continue
        try:
            plugins.append(catalog.find("plugin", name, settings["plugins"].origin))
            items[-1] = lasting_name(plugins[-1], name)
        except UserError as problem:
            problems.append(str(problem))
    if problems:
        raise UserError("\n".join(problems))
    return Choice(offers, tuple(dict.fromkeys(plugins)), lasting | {"plugins": tuple(items)})


def lasting_name(offer: Offer, written: str) -> str:
    """What means ``offer``, of which the user wrote ``written``, whatever else is installed.

    Of panda's own that is the name alone, as it is written.
    """
    return written.rpartition(":")[2] if offer.is_own else offer.qualified


def _own(name: str) -> str:
    """A default means panda's own component, even where an installed package has one of the same name."""
    return name if ":" in name else f"{OWN_DISTRIBUTION}:{name}"


def find_model(catalog: Catalog, arch: Setting, model: Setting) -> tuple[dict[str, Offer], dict[str, str]]:
    """The arch and the model that the run names, and the names that last. Of the options ``arch`` and ``model``.

    ``model`` may hold an arch, as PandaLLM's documentation writes it. Raises UserError where one is unknown.
    """
    found: dict[str, Offer] = {}
    lasting: dict[str, str] = {}
    if arch.value:
        found["arch"] = catalog.find("arch", arch.value, arch.origin)
        lasting["arch"] = lasting_name(found["arch"], arch.value)
    if not model.value:
        return found, lasting
    if catalog.has("model", model.value):
        of_model = found["model"] = catalog.find("model", model.value, model.origin)
    elif catalog.has("arch", model.value):
        of_model = catalog.find("arch", model.value, model.origin)
        if found and found["arch"] != of_model:
            raise UserError(
                f"{model.origin}: model {model.value!r} is an arch, and arch {arch.value!r} ({arch.origin}) another."
                " Give one of them."
            )
        found = {"arch": of_model}
    elif ":" in model.value:
        of_model = catalog.find("model", model.value, model.origin)  # which says what is missing
    else:
        known = [name for kind in ("arch", "model") for name in catalog.spellings(kind, model.value)]
        raise UserError(
            f"{model.origin}: unknown model or arch {model.value!r}.{did_you_mean(model.value, known)}"
            f"{strays(model.value)} `panda list archs` and `panda list models` show what is installed."
        )
    return found, lasting | {"model": lasting_name(of_model, model.value)}


def model_of(catalog: Catalog, offer: Offer) -> Offer:
    """The model of the arch ``offer``: that of the same distribution, if it has one, whoever else has the name."""
    arch = load_component(catalog, offer)
    assert arch.model is not None
    beside = f"{offer.distribution}:{arch.model}"
    if ":" not in arch.model and catalog.has("model", beside):
        return catalog.find("model", beside, arch.describe())
    return catalog.find("model", arch.model, f"{offer.describe()}: {arch.describe()}", by=offer)


Owner = tuple[Offer, Component]
"""A component that a run chose: its offer, and what importing it registered."""


@dataclass(frozen=True)
class NamedByOptions:
    """The components of added kinds that options of others name."""

    owners: list[Owner]
    lasting: dict[tuple[Component, str], Any]
    """By component and option the names that last."""
    problems: list[str]


def named_by_options(catalog: Catalog, owners: Iterable[Owner], given: Mapping[str, Given]) -> NamedByOptions:
    """The components of added kinds that options of ``owners``, and of what these name, name.

    A default means a component of the distribution whose option it is. A value that does not fit its option names
    nothing here: that is reported where all values are converted.
    """
    found: dict[Component, Offer] = {}
    lasting: dict[tuple[Component, str], Any] = {}
    problems: list[str] = []
    queue = list(owners)
    for offer, component in queue:
        for key, option in options_of(component.options).items():
            if option.names is None:
                continue
            try:
                spelled = (f"{each}.{key}" for each in dict.fromkeys((prefix(component), own_prefix(component))))
                written = next((given[each] for each in (*spelled, key) if each in given), None)
                new = _named(catalog, (offer, component), option, written)
            except UserError as problem:
                problems.append(str(problem))
                continue
            names = tuple(lasting_name(of, named.name) for of, named in new)
            lasting[component, key] = names if option.is_list else names[0] if names else None
            queue += [owner for owner in new if owner[1] not in found]
            found |= {named: of for of, named in new if named not in found}
    return NamedByOptions([(of, named) for named, of in found.items()], lasting, problems)


def _named(catalog: Catalog, owner: Owner, option: Option, given: Given | None) -> list[Owner]:
    """The components that the value of ``option`` of ``owner`` names.

    Raises UserError for an unknown name, and for a component that is named twice.
    """
    assert option.names is not None
    offer, component = owner
    if option.names in KINDS or option.names not in catalog.kinds:
        raise UserError(
            f"{component.describe()}: its option {option.key!r} names components of kind {option.names!r}, which no"
            f" installed package adds. This is a fault of {offer.describe()}."
        )
    origin = given.origin if given else ""
    try:
        value = option.convert(given) if given else option.default
    except UserError:
        return []
    names = [] if value in (None, "", REQUIRED) else [value] if isinstance(value, str) else value
    found: list[Owner] = []
    for name in names:
        own = f"{offer.distribution}:{name}"
        is_own = given is None and ":" not in name and catalog.has(option.names, own)
        new = catalog.find(option.names, own if is_own else name, origin, by=None if given else offer)
        found.append((new, load_component(catalog, new)))
        if found[-1][1] in [earlier for _, earlier in found[:-1]]:
            raise UserError(f"{origin}: {option.key} names {option.names} {name!r} twice. Name it once.")
    return found


def prefix(component: Component) -> str:
    """The prefix of a key that several components have: the kind, or the name where a run can have several of it."""
    has_one = component.kind in KINDS and component.kind != "plugin"
    return component.kind if has_one else own_prefix(component)


def own_prefix(component: Component) -> str:
    """The prefix that is the name of ``component``: a key of it can always be written so."""
    return component.name.replace("-", "_")


def load_component(catalog: Catalog, offer: Offer) -> Component:
    component = catalog.load(offer)
    assert component is not None
    return component
