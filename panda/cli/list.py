"""``panda list``: the installed components, read from metadata and source; none of them is imported."""

from __future__ import annotations

import json
from typing import Any

from panda.cli.command import run_command
from panda.cli.parser import Parser
from panda.cli.parser import add_blocking
from panda.files.terminal import fitted
from panda.files.terminal import number_of
from panda.registry import Offer
from panda.registry.catalog import catalog_with
from panda.registry.declarations import module_summary
from panda.registry.hook_facts import hooks
from panda.registry.offers import kind_named
from panda.registry.offers import kinds
from panda.registry.offers import with_readable_source

HOOKS = ("hooks", "hook")
"""Names of a kind that is none: hooks are panda's, and packages add none."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda list``."""
    return run_command(_list, argv)


def parser() -> Parser:
    """The flags of ``panda list``."""
    parser = Parser(
        prog="panda list",
        description="List the installed components: their names, packages and descriptions. Imports none of them.",
        epilog="example: panda list optimizers --json",
    )
    plurals = ", ".join(kind.plural for kind in kinds().values())
    parser.add_argument("kind", nargs="?", help=f"{plurals}, hooks; by default all components")
    parser.add_argument("--json", action="store_true", help="one JSON array of objects")
    add_blocking(parser)
    parser.add_argument("--user_dir", "--user-dir", metavar="FOLDER", help="list the components in this folder, too")
    parser.values["kind"] = lambda _: [*(kind.plural for kind in kinds().values()), HOOKS[0]]
    return parser


def _list(argv: list[str]) -> None:
    arguments = parser().parse_args(argv)
    if arguments.kind in HOOKS:
        _list_hooks(as_json=arguments.json)
        return
    catalog = catalog_with(arguments.user_dir, arguments.p)
    shown = [kind_named(arguments.kind, catalog.kinds)] if arguments.kind else list(catalog.kinds.values())
    if arguments.json:
        rows = [_described(offer) for kind in shown for offer in catalog.offers(kind.name)]  # reads every source
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    every = [offer for kind in shown for offer in catalog.offers(kind.name)]
    readable = set(with_readable_source(every))
    for number, kind in enumerate(shown):
        offers = catalog.offers(kind.name)
        print("\n" * (number > 0) + "\n".join(fitted([f"{kind.plural}: {kind.summary}"], 2)))
        name_width = max((len(offer.name) for offer in offers), default=0)
        provider_width = max((len(offer.provider) for offer in offers), default=0)
        for offer in offers:
            summary = _summary(offer) if offer in readable else ""
            line = f"  {offer.name:{name_width}}  {offer.provider:{provider_width}}  {summary}".rstrip()
            print("\n".join(fitted([line], name_width + 4)))
        if not offers:
            print("  none")
    if unread := len(every) - len(readable):
        count = number_of(unread, "component")
        print(f"\nDescriptions of {count} of other packages are left out; `--json` shows all.")


def _list_hooks(*, as_json: bool) -> None:
    """The hooks that plugins implement: when each is called, on which ranks, with which arguments."""
    found = hooks()
    if as_json:
        rows = [
            {"name": each.name, "ranks": each.ranks, "arguments": each.arguments, "summary": each.when}
            for each in found
        ]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    print("hooks: what a plugin implements, marked with @hookimpl, with any of the arguments")
    called = [f"{each.name}({', '.join(each.arguments)})" for each in found]
    for call, each in zip(called, found, strict=True):
        print(f"  {call:{max(map(len, called))}}  {each.ranks:{max(len(other.ranks) for other in found)}}  {each.when}")


def _summary(offer: Offer) -> str:
    if declared := offer.declaration:
        return declared.summary
    return module_summary(offer.module, offer.file) if offer.kind == "plugin" else ""


def _described(offer: Offer) -> dict[str, Any]:
    declared = offer.declaration
    return {
        "kind": offer.kind,
        "name": offer.name,
        "distribution": offer.distribution,
        "version": offer.version,
        "module": offer.module,
        "summary": _summary(offer),
        "line": declared.line if declared else None,
    }
