"""The configuration of a command that takes CONFIG and flags, as panda-train does."""

from __future__ import annotations

from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import Configuration
from panda.configuration.configure import configure
from panda.registry import UserError


def configured(argv: list[str], usage: str) -> Configuration | None:
    """The configuration in ``argv``; None where help was asked for, which is then printed."""
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    arguments = parse_arguments(argv)
    if arguments.help:
        print(usage)
        return None
    if not argv:  # not a success: `panda check $CONFIG` with nothing in it has checked nothing
        raise UserError(f"no configuration is given.\n{usage}")
    return configure(arguments)
