"""``panda show``: one component, its options and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence

from panda.cli.command import run_command
from panda.cli.help import print_options
from panda.cli.list import HOOKS
from panda.cli.parser import Parser
from panda.files.terminal import fitted
from panda.registry import UserError
from panda.registry import hookspecs
from panda.registry.catalog import catalog_with
from panda.registry.declarations import module_summary
from panda.registry.hook_facts import HookFacts
from panda.registry.hook_facts import hook_named
from panda.registry.hook_facts import hooks
from panda.registry.offers import kind_named
from panda.registry.offers import kinds
from panda.registry.options import options_of


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda show``."""
    return run_command(_show, argv)


def parser() -> Parser:
    """The flags of ``panda show``."""
    parser = Parser(
        prog="panda show",
        description="Show one component: its description, its options with their defaults, and where it comes from.",
        epilog="example: panda show model llama",
    )
    parser.add_argument("kind", help=f"{', '.join(kinds())}, hook")
    parser.add_argument("name", help="its name, or DISTRIBUTION:NAME")
    parser.add_argument("--user_dir", "--user-dir", metavar="FOLDER", help="of the components in this folder, too")
    parser.values |= {"kind": lambda _: [*kinds(), HOOKS[1]], "name": _names}
    return parser


def _names(before: Sequence[str]) -> list[str]:
    """The names of the kind that is the first word of ``before``."""
    kind = next((word for word in before if not word.startswith("-")), "")
    if kind in HOOKS:
        return [hook.name for hook in hooks()]
    catalog = catalog_with(None)
    return [offer.name for offer in catalog.offers(kind_named(kind, catalog.kinds).name)]


def _show(argv: list[str]) -> None:
    arguments = parser().parse_args(argv)
    if arguments.kind in HOOKS:
        _show_hook(hook_named(arguments.name))
        return
    catalog = catalog_with(arguments.user_dir)
    offer = catalog.find(kind_named(arguments.kind, catalog.kinds).name, arguments.name)
    component = catalog.load(offer)
    print(f"{offer.kind} {component.name if component else offer.name}")
    if component is None:
        _print_doc(module_summary(offer.module, offer.file))
        print(f"\n  from     {offer.provider}\n  module   {offer.module}")
        return
    _print_doc(component.doc)
    print(f"\n  from     {offer.provider}")
    print(f"  module   {offer.module}")
    print("  source   {}:{}".format(*component.source))
    if component.aliases:
        print(f"  aliases  {', '.join(component.aliases)}")
    if component.model is not None:
        print(f"  model    {component.model}\n")
        with offer.attributed("the factory"):
            values = component.factory()
        if not isinstance(values, Mapping):
            raise UserError(
                f"{component.describe()} returned {values!r}, not a mapping of options of {component.model!r}. This is"
                f" a fault of {offer.describe()}."
            )
        for key, value in values.items():
            print(f"  {key}: {value}")
        return
    options = options_of(component.options)
    if options:
        print_options("options", options)
    else:
        print("\nno options")


def _print_doc(doc: str) -> None:
    print("\n".join(fitted((f"  {line}".rstrip() for line in doc.splitlines()), 2)))


def _show_hook(hook: HookFacts) -> None:
    print(f"hook {hook.name}")
    _print_doc(hook.doc)
    print(f"\n  ranks      {hook.ranks}\n  arguments  {', '.join(hook.arguments)}: any of them, in any order")
    print(f"  source     {hookspecs.__file__}:{hook.line}\n\n  @hookimpl")
    print(f"  def {hook.name}({', '.join(hook.arguments)}): ...")
