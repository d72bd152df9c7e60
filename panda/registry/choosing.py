"""Which components a run names: found, and not imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from panda.registry.catalog import Catalog
from panda.registry.components import Component
from panda.registry.errors import UserError
from panda.registry.errors import did_you_mean
from panda.registry.offers import OWN_DISTRIBUTION
from panda.registry.offers import Offer
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
    arch = load_component(catalog, offer)
    assert arch.model is not None
    beside = f"{offer.distribution}:{arch.model}"
    if ":" not in arch.model and catalog.matches("model", beside):
        return catalog.find("model", beside, arch.describe())
    return catalog.find("model", arch.model, arch.describe())


def load_component(catalog: Catalog, offer: Offer) -> Component:
    component = catalog.load(offer)
    assert component is not None
    return component
