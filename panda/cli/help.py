"""``panda-train --help``: every flag of the run that the other arguments describe."""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from panda.configuration.arguments import Arguments
from panda.configuration.options import DEFAULT_PLUGINS
from panda.configuration.options import RunOptions
from panda.configuration.user_code import catalog_of
from panda.registry import Catalog
from panda.registry import Component
from panda.registry import UserError
from panda.registry.choosing import NAMING
from panda.registry.choosing import Choice
from panda.registry.choosing import choose
from panda.registry.choosing import model_of
from panda.registry.choosing import named_by_options
from panda.registry.kinds import KINDS
from panda.registry.options import REQUIRED
from panda.registry.options import Option
from panda.registry.options import options_of
from panda.registry.settings import convert_options

USAGE = """\
usage: panda-train [--config FILE] [--KEY VALUE ...] [-p no:NAME] [--version]

Train a language model. Every key of the YAML file is a flag, with `-` or `_`;
a flag wins over the file. Name a task, an arch and an optimizer here to see
their flags below.

examples:
  panda-train --config panda:configs/instruct-tiny.yaml
  panda-train --config panda:configs/instruct-tiny.yaml --learning_rate 2e-3
  panda-train --task instruct --arch llama-7b --optimizer adamw --help
  torchrun --nproc_per_node 2 --no-python panda-train \\
    --config panda:configs/instruct-tiny.yaml

  --config FILE          flat YAML, one `key: value` a line (also
                         --conf_path); `panda:configs/` has some
  -p no:NAME             leave out a plugin, or everything that a distribution
                         provides
  -V, --version          show the version of panda
  -h, --help             show this help"""


def print_train_help(arguments: Arguments) -> None:
    """Print the flags of every run, and of the components that ``arguments`` choose."""
    catalog = catalog_of(arguments)
    components = chosen_components(
        catalog, arguments
    )  # first, so that an unknown name is reported instead of a page of flags
    arch, values = _arch_values(catalog, arguments)
    print(USAGE)
    options = options_of(RunOptions)
    for title, keys in groups_of(RunOptions).items():
        print_options(f"every run: {title}", {key: options[key] for key in keys})
    for component in components:
        sizes = values if arch and component.kind == "model" else {}
        title = f"{component.kind} {component.name}: {component.summary}"
        print_options(title, options_of(component.options), sizes, arch)
    print()
    for kind in catalog.kinds.values():
        names = ", ".join(dict.fromkeys(offer.name for offer in catalog.offers(kind.name)))
        if kind.name != "kind":  # of which a run chooses none
            print(_wrapped(f"{kind.plural}: {names or 'none'}", indent=2))


def groups_of(cls: type) -> dict[str, list[str]]:
    """The options of ``cls`` by the comments ``# -- TITLE`` over them in its source."""
    found: dict[str, list[str]] = {}
    for title, key in re.findall(r"^    (?:# -- (.+)|(\w+): .*)$", inspect.getsource(cls), re.MULTILINE):
        if title:
            found[title] = []
        elif found:
            found[next(reversed(found))].append(key)
    return found


def chosen_components(catalog: Catalog, arguments: Arguments) -> list[Component]:
    """The components that ``arguments`` choose, imported. Raises UserError for an unknown name."""
    choice = _choice(catalog, arguments)
    by_kind = dict(choice.offers)
    if "arch" in by_kind and "model" not in by_kind:
        by_kind["model"] = model_of(catalog, by_kind["arch"])
    offers = [*(by_kind[kind] for kind in KINDS if kind in by_kind and kind != "arch"), *choice.plugins]
    owners = [(offer, component) for offer in offers if (component := catalog.load(offer))]
    named = named_by_options(catalog, owners, arguments.given)
    if named.problems:
        raise UserError("\n".join(named.problems))
    return [component for _, component in [*owners, *named.owners]]


def _choice(catalog: Catalog, arguments: Arguments) -> Choice:
    core = options_of(RunOptions)
    settings, problems = convert_options({key: core[key] for key in NAMING}, arguments.given)
    if problems:
        raise UserError("\n".join(problems))
    return choose(catalog, settings, DEFAULT_PLUGINS)


def _arch_values(catalog: Catalog, arguments: Arguments) -> tuple[str, Mapping[str, Any]]:
    """The arch that ``arguments`` choose, and the values that it gives the options of its model; empty for none."""
    offer = _choice(catalog, arguments).offers.get("arch")
    component = catalog.load(offer) if offer else None
    return (component.name, component.factory()) if component else ("", {})


def print_options(
    title: str, options: Mapping[str, Option], values: Mapping[str, Any] | None = None, source: str = ""
) -> None:
    """Print the flags, defaults and help of ``options`` under ``title``.

    ``values`` stand in the place of defaults, and come from ``source``.
    """
    if options:
        print(f"\n{_wrapped(title, indent=0)}")
    for key, option in options.items():
        known = values is not None and key in values
        shown = f" [{values[key]}, of {source}]" if known else _default(option)  # type: ignore[index]
        print(_wrapped(f"--{key}{shown}", indent=6, first=2))
        print(_wrapped(f"{option.doc} ({option.expects})".strip(), indent=25))


def _default(option: Option) -> str:
    if option.default is REQUIRED:
        return " (required)"
    if option.default in (None, "", ()):
        return ""
    if isinstance(option.default, tuple):
        return f" [{', '.join(map(str, option.default))}]"
    plain = isinstance(option.default, str) and option.default == option.default.strip()
    return f" [{option.default if plain else repr(option.default)}]"


def _wrapped(text: str, *, indent: int, first: int | None = None) -> str:
    width = max(60, min(110, shutil.get_terminal_size().columns))
    begin = " " * (indent if first is None else first)
    return textwrap.fill(text, width, initial_indent=begin, subsequent_indent=" " * indent, break_on_hyphens=False)
