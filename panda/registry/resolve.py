"""Resolves a configuration: components are chosen, every value is converted, and its origin kept.

Precedence per key: default, then arch, then YAML, then flag. Every key has one owner, the core or
one chosen component.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from typing import Any

from panda.registry.api import gained_key
from panda.registry.catalog import Catalog
from panda.registry.choosing import CHOSEN_BY_NAME
from panda.registry.choosing import NAMING
from panda.registry.choosing import Choice
from panda.registry.choosing import Owner
from panda.registry.choosing import choose
from panda.registry.choosing import find_model
from panda.registry.choosing import load_component
from panda.registry.choosing import model_of
from panda.registry.choosing import named_by_options
from panda.registry.choosing import own_prefix
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
        try:
            with self.attributed("the factory"):
                built = self.component.factory(self.options, context)
        except SystemExit as ended:
            if isinstance(ended.code, int) and ended.code >= 128:  # of a signal, which may come at any moment
                raise
            raise UserError(
                f"{self.component.describe()} ended the process (SystemExit: {ended}), and returned nothing."
                f" This is a fault of {self.offer.describe()}."
            ) from ended
        if built is None or not isinstance(built, expected):
            wanted = "an object" if expected is object else f"a {expected.__qualname__}{_lacking(built, expected)}"
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
    lasting: Mapping[str, Any]
    """Of keys that name components: the values that mean the same whatever else is installed."""
    warnings: tuple[str, ...] = ()
    """Of keys that may have been meant otherwise."""

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
) -> Resolved:
    """Resolve ``given`` (flags already laid over YAML) against the core options and what is installed.

    ``renamed`` maps keys that panda lacks to advice, and kinds whose name is one that other tools have. Raises
    UserError for all bad keys and values at once, where that is possible.
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
    keys = _keys_of(named.owners, core_options, given, catalog.api)
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
        keys.warnings,
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
    keys = _keys_of(named.owners, core_options, given, catalog.api)
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


@dataclass(frozen=True)
class _Keys:
    """How the options of the components that a run names are written in it."""

    shared: Mapping[str, list[Component]]
    """Options that several components have, by name."""
    core: Collection[str]
    """Options that have the name of a core option."""
    taken: Mapping[str, Component]
    """Of those: the ones that were there before the core option, and that the name alone means."""
    named_alike: Collection[str]
    """Prefixes that several components have as their names, or one as its name and another as its kind."""
    warnings: tuple[str, ...]

    def written(self, component: Component, key: str) -> str:
        """How the option ``key`` of ``component`` is written in this run."""
        return f"{prefix(component)}.{key}" if key in self.shared or key in self.core else key

    def spellings(self, component: Component, key: str) -> list[str]:
        """All ways to write it: with its kind or its name before it, and alone where that means no other."""
        names = [prefix(component)]
        if own_prefix(component) not in self.named_alike:
            names.append(own_prefix(component))
        spelled = [f"{name}.{key}" for name in dict.fromkeys(names)]
        alone = self.taken.get(key) is component if key in self.core else key not in self.shared
        return [*spelled, key] if alone else spelled


def _keys_of(
    owners: list[Owner], core_options: Mapping[str, Option], given: Mapping[str, Given], api: int | None
) -> _Keys:
    """How the options of ``owners`` are written, where the configuration states the version ``api``, or none."""
    having: dict[str, list[Owner]] = {}
    for owner in owners:
        for key in options_of(owner[1].options):
            having.setdefault(key, []).append(owner)
    shared = {key: [component for _, component in several] for key, several in having.items() if len(several) > 1}
    core = [key for key in having if key in core_options]
    taken: dict[str, Component] = {}
    warnings = []
    for key in core:
        (offer, component), *others = having[key]
        stated = int(offer.api) if api is None and offer.api else api
        is_older = stated is not None and gained_key(key) > stated and key not in NAMING
        if key in given and is_older and not others:
            taken[key] = component
        if key in given and given[key].origin:
            means = f"that of {component.kind} {component.name}" if key in taken else "that of every run"
            whole = " and ".join(f"`{prefix(each)}.{key}`" for _, each in having[key])
            warnings.append(
                f"{given[key].origin}: {key!r} is taken as {means}. Every run has a key of this name, which can be"
                f" written `{CORE}.{key}`, and {' and '.join(f'{each.kind} {each.name}' for _, each in having[key])},"
                f" whose key is {whole}."
            )
    names = [own_prefix(component) for _, component in owners]
    prefixes = {prefix(component) for _, component in owners if prefix(component) != own_prefix(component)}
    alike = {name for name in names if names.count(name) > 1 or name in prefixes or name == CORE}
    return _Keys(shared, core, taken, alike, tuple(warnings))


@dataclass
class _Converted:
    """The options of the components that a run names."""

    settings: dict[str, Setting]
    chosen: list[Chosen]
    used: set[str]
    """Every key that some component answers to."""
    problems: list[str]


def _convert_all(named: _Named, given: Mapping[str, Given], keys: _Keys) -> _Converted:
    arch_values = _arch_values(named.arch, named.model) if named.arch else {}
    arch_label = named.arch.label if named.arch else ""
    done = _Converted({}, [], set(), [])
    for offer, component in named.owners:
        mine, known, found = _given_to(component, given, keys)
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


def _given_to(
    component: Component, given: Mapping[str, Given], keys: _Keys
) -> tuple[dict[str, Given], set[str], list[str]]:
    """The values given for the options of ``component``, every key that it answers to, and the problems."""
    mine: dict[str, Given] = {}
    known: set[str] = set()
    problems: list[str] = []
    for key in options_of(component.options):
        spellings = keys.spellings(component, key)
        known |= {key, *spellings}
        if key in keys.shared and key not in keys.core and key in given:
            several = keys.shared[key]
            others = " and ".join(f"`{prefix(c)}.{key}` ({c.kind} {c.name})" for c in several)
            problems.append(f"{given[key].origin}: {key!r} is an option of more than one: write {others}.")
        for spelling in spellings:
            if spelling in given:
                if key in mine:
                    problems.append(f"{given[spelling].origin}: {key!r} is also given at {mine[key].origin}.")
                mine[key] = given[spelling]
    return mine, known, problems


def _attributed_schedule(schedule: Callable[[int], float], chosen: Chosen) -> Callable[[int], float]:
    def factor(completed_steps: int) -> float:
        with chosen.attributed("the schedule"):
            return schedule(completed_steps)

    return factor


def _lacking(built: object, expected: Any) -> str:
    """What ``built`` lacks of a protocol that is ``expected``."""
    if not getattr(expected, "_is_protocol", False) or built is None:
        return ""
    members = [name for name in {**vars(expected), **expected.__annotations__} if not name.startswith("_")]
    return f", which has {' and '.join(f'`{name}`' for name in members if not hasattr(built, name))}"


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__qualname__}"
