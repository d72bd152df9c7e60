"""Resolves a configuration: components are chosen, every value is converted, and its origin kept.

Precedence per key: default, then arch, then YAML, then flag. Every key has one owner, the core or
one chosen component.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

from panda.registry.catalog import Catalog
from panda.registry.choosing import CHOSEN_BY_NAME
from panda.registry.choosing import NAMING
from panda.registry.choosing import Choice
from panda.registry.choosing import choose
from panda.registry.choosing import find_model
from panda.registry.choosing import load_component
from panda.registry.choosing import model_of
from panda.registry.choosing import named_by_options
from panda.registry.choosing import prefix
from panda.registry.chosen import Chosen
from panda.registry.components import Component
from panda.registry.components import NoOptions
from panda.registry.errors import UserError
from panda.registry.errors import did_you_mean
from panda.registry.kinds import KINDS
from panda.registry.offers import Offer
from panda.registry.option_keys import Keys
from panda.registry.option_keys import given_to
from panda.registry.option_keys import keys_of
from panda.registry.options import Given
from panda.registry.options import Option
from panda.registry.options import options_of
from panda.registry.settings import CORE
from panda.registry.settings import Setting
from panda.registry.settings import convert_options
from panda.registry.unknown_keys import unknown_key_messages


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
    lasting: Mapping[str, Any]
    """Of keys that name components: the values that mean the same whatever else is installed."""
    warnings: tuple[str, ...] = ()
    """Of keys that may have been meant otherwise, or are left out."""

    @property
    def offers(self) -> tuple[Offer, ...]:
        """Every component that the run named."""
        return (*(chosen.offer for chosen in self.chosen), *self.hook_modules)

    def in_full(self, key: str) -> str:
        """``key`` of the settings as it means the same to any version of panda: one that a component has, too, is
        written ``run.KEY`` for that of every run."""
        clashes = "." not in key and any(other.endswith(f".{key}") for other in self.settings)
        return f"{CORE}.{key}" if clashes and self.settings[key].owner == CORE else key

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
    recorded: Collection[str] = (),
    changed: Collection[str] = (),
) -> Resolved:
    """Resolve ``given`` (flags already laid over YAML) against the core options and what is installed.

    ``renamed`` maps keys that panda lacks to advice, and kinds whose name is one that other tools have. Where the
    command line ``changed`` a key that names components, those of the ``recorded`` keys, which a run wrote, that no
    component takes any more are left out, with a warning. Raises UserError for all bad keys and values at once, where
    that is possible.
    """
    core_options = options_of(core)
    core_given, problems = _given_to_core(given, core_options)
    core_values, more = convert_options(core_options, core_given)
    problems += more
    answered = [key for key in given if (key in (renamed or {}) or given[key].is_nested) and key not in core_options]
    answers = unknown_key_messages(catalog, answered, given, [], renamed or {}, [])
    if any(key not in core_values for key in NAMING):
        raise UserError("\n".join(problems + answers))
    try:
        choice = choose(catalog, core_values, default_plugins)
    except UserError as problem:
        problems += [str(problem), *_other_names(catalog, core_values, renamed or {}), *answers]
        raise UserError("\n".join(problems)) from None
    if "arch" not in choice.offers and "model" not in choice.offers:
        raise UserError("\n".join([*problems, *_without_model(catalog, given, core_options, renamed or {})]))
    named = _load(catalog, choice, given)
    keys = keys_of(named.owners, core_options, given, catalog.api)
    if keys.taken:  # by options that were there first
        core_given, problems = _given_to_core(given, core_options, keys.taken)
        core_values, more = convert_options(core_options, core_given)
        problems += more
    problems += named.problems
    options = _convert_all(named, given, keys)
    known = [*core_options, *options.settings]
    components = [component for _, component in named.owners]
    of_core = {*core_options, *(f"{CORE}.{key}" for key in core_options)}
    unused = [key for key in given if key not in of_core and key not in options.used]
    naming = {*NAMING, *(keys.written(component, key) for component, key in named.lasting)}
    replaced = [key for key in unused if key in recorded and not naming.isdisjoint(changed)]
    unused = [key for key in unused if key not in replaced]
    problems += options.problems + unknown_key_messages(catalog, unused, given, known, renamed or {}, components)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))

    by_kind = {item.component.kind: item for item in options.chosen if item.component.kind in KINDS}
    by_kind.pop("plugin", None)
    of_options = {keys.written(component, key): value for (component, key), value in named.lasting.items()}
    return Resolved(
        core(**{key: core_values[key].value for key in core_options}),
        by_kind | ({"arch": named.arch} if named.arch else {}),
        tuple(item for item in options.chosen if item.component.kind not in KINDS),
        tuple(item for item in options.chosen if item.component.kind == "plugin"),
        named.hook_modules,
        core_values | options.settings,
        {**choice.lasting, **of_options},
        (*keys.warnings, *(_left_out(key, given[key]) for key in replaced)),
    )


def resolve_model(catalog: Catalog, core: type, given: Mapping[str, Given]) -> Resolved:
    """The core options and the model of ``given``, the whole configuration of a run; it chose other components, too.

    Those are neither found nor imported, and keys of theirs are not looked at. Raises UserError.
    """
    core_options = options_of(core)
    core_given, problems = _given_to_core(given, core_options)
    core_values, more = convert_options(core_options, core_given)
    if problems + more:
        raise UserError("\n".join(problems + more))
    offers, lasting = find_model(catalog, core_values["arch"], core_values["model"])
    if not offers:
        raise UserError("\n".join(_without_model(catalog, given, core_options, {})))
    named = _load_model(catalog, offers)
    keys = keys_of(named.owners, core_options, given, catalog.api)
    options = _convert_all(named, given, keys)
    if options.problems:
        raise UserError("\n".join(options.problems))
    return Resolved(
        core(**{key: core_values[key].value for key in core_options}),
        {"model": options.chosen[0]} | ({"arch": named.arch} if named.arch else {}),
        (),
        (),
        (),
        core_values | options.settings,
        lasting,
    )


def _left_out(key: str, given: Given) -> str:
    return f"{given.origin}: `{key}: {given.text}` is left out: no component of this run has that option any more."


def _given_to_core(
    given: Mapping[str, Given], core_options: Mapping[str, Option], taken: Collection[str] = ()
) -> tuple[dict[str, Given], list[str]]:
    """The values given for the core options, as ``KEY`` or as ``run.KEY``, and the problems.

    Keys that are ``taken`` mean an option of a component, and the core option is only written ``run.KEY``.
    """
    found: dict[str, Given] = {}
    problems = []
    for key in core_options:
        whole = given.get(f"{CORE}.{key}")
        plain = given.get(key) if key not in taken else None
        if whole and plain:
            problems.append(f"{whole.origin}: {key!r} is also given at {plain.origin}.")
        if value := whole or plain:
            found[key] = value
    return found, problems


def _other_names(catalog: Catalog, values: Mapping[str, Setting], renamed: Mapping[str, str]) -> list[str]:
    """What unknown names of components that another tool has are in panda."""
    return [
        f"{values[kind].origin}: {values[kind].value!r} is another tool's name: {renamed[kind]}"
        for kind in CHOSEN_BY_NAME
        if kind in renamed and not catalog.has(kind, values[kind].value)
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
    lasting: Mapping[tuple[Component, str], Any]
    """By component and option the names of components that it names."""
    problems: tuple[str, ...]

    @property
    def model(self) -> Component:
        return next(component for _, component in self.owners if component.kind == "model")


def _load(catalog: Catalog, choice: Choice, given: Mapping[str, Given]) -> _Named:
    """The components of ``choice``, and those that their options name."""
    of_model = {kind: choice.offers[kind] for kind in ("arch", "model") if kind in choice.offers}
    loaded = _load_model(catalog, of_model)
    others = {kind: offer for kind, offer in choice.offers.items() if kind not in of_model}
    task = others.pop("task")
    owners = [(task, load_component(catalog, task)), *loaded.owners]
    owners += [(offer, load_component(catalog, offer)) for offer in others.values()]
    plugins = [(offer, catalog.load(offer)) for offer in choice.plugins]
    owners += [(offer, component) for offer, component in plugins if component is not None]
    named = named_by_options(catalog, owners, given)
    modules = tuple(offer for offer, component in plugins if component is None)
    return _Named(loaded.arch, [*owners, *named.owners], modules, named.lasting, tuple(named.problems))


def _load_model(catalog: Catalog, offers: Mapping[str, Offer]) -> _Named:
    """The model of ``offers``, by kind, and the arch if there is one."""
    arch = offers.get("arch")
    chosen = Chosen(arch, load_component(catalog, arch), NoOptions()) if arch else None
    model = offers["model"] if "model" in offers or arch is None else model_of(catalog, arch)
    return _Named(chosen, [(model, load_component(catalog, model))], (), {}, ())


@dataclass
class _Converted:
    """The options of the components that a run names."""

    settings: dict[str, Setting]
    chosen: list[Chosen]
    used: set[str]
    """Every key that some component answers to."""
    problems: list[str]


def _convert_all(named: _Named, given: Mapping[str, Given], keys: Keys) -> _Converted:
    arch_values = _arch_values(named.arch, named.model) if named.arch else {}
    arch_label = named.arch.label if named.arch else ""
    done = _Converted({}, [], set(), [])
    for offer, component in named.owners:
        mine, known, found = given_to(component, given, keys)
        done.used |= known
        overrides = arch_values if component.kind == "model" else {}
        owner = f"{component.kind} {component.name}"
        converted, more = convert_options(options_of(component.options), mine, owner, overrides, arch_label)
        done.problems += found + more
        done.settings |= {keys.written(component, key): setting for key, setting in converted.items()}
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
                f" This is a fault of {chosen.offer.describe()}."
            )
        try:
            checked[key] = known[key].check(value)
        except ValueError as problem:
            detail = f" {problem}" if str(problem) else ""
            raise UserError(
                f"{arch.describe()}: {key}: {value!r} is not {known[key].expects}.{detail} This is a fault of"
                f" {chosen.offer.describe()}."
            ) from None
    return checked
