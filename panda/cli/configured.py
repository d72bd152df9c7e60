"""The configuration of a command that takes CONFIG and the flags of panda-train."""

from __future__ import annotations

from panda.cli.parser import in_short
from panda.configuration.arguments import parse_arguments
from panda.configuration.configure import Configuration
from panda.configuration.configure import configure
from panda.registry import UserError


def configured(argv: list[str], usage: str, *, reads_data: bool = True) -> Configuration | None:
    """The configuration that ``argv`` describes; None if it asks for help, which is then printed.

    Unless the command ``reads_data``, names of data stay as they are.
    """
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    arguments = parse_arguments(argv)
    if arguments.help:
        print(usage)
        return None
    if not argv:  # an error: `panda check $CONFIG` with an empty variable would check nothing
        raise UserError(f"no configuration is given.\n{in_short(usage)}")
    configuration = configure(arguments)
    if not reads_data:
        return configuration

    from panda.run.sources import with_lasting_sources

    return with_lasting_sources(configuration)
