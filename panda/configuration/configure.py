"""Arguments to a resolved configuration: what panda-train, panda check and --help share."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from panda.configuration.arguments import Arguments
from panda.configuration.arguments import parse_arguments
from panda.configuration.options import DEFAULT_PLUGINS
from panda.configuration.options import IMPLIED
from panda.configuration.options import RENAMED
from panda.configuration.options import RunOptions
from panda.configuration.refusals import refuse
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.resolve import Resolved
from panda.registry.resolve import Setting
from panda.registry.resolve import resolve


def configure(arguments: Arguments) -> tuple[Resolved, Catalog]:
    """Resolve ``arguments`` against what is installed. Raises UserError; imports no torch."""
    catalog = Catalog(arguments.blocked)
    for name in catalog.unused_blocks():
        print(
            f"warning: -p no:{name}: no distribution, module or plugin that is installed has that name.",
            file=sys.stderr,
        )
    resolved = resolve(catalog, RunOptions, arguments.given, default_plugins=DEFAULT_PLUGINS, renamed=RENAMED)
    resolved = _with_implied(resolved)
    refuse(resolved)
    if resolved.core.ckpt_path is not None:
        from panda.configuration.following import follow_checkpoint
        from panda.weights.finding import find_pretrained

        resolved = follow_checkpoint(resolved)
        pretrained = find_pretrained(resolved.core)
        if pretrained and os.environ.get("RANK", "0") == "0":
            print(f"weights: {pretrained.describe()}")
            print(f"tokenizer: {resolved.core.tokenizer} ({resolved.settings['tokenizer'].origin})")
    return resolved, catalog


def configured(argv: list[str], usage: str) -> Resolved | None:
    """What a command that takes CONFIG and flags is about. None where it was asked for help, which is then printed."""
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    arguments = parse_arguments(argv)
    if arguments.help:
        print(usage)
        return None
    if not argv:  # not a success: `panda check $CONFIG` with nothing in it has checked nothing
        raise UserError(f"no configuration is given.\n{usage}")
    return configure(arguments)[0]


def _with_implied(resolved: Resolved) -> Resolved:
    """``resolved`` with the defaults that its switches imply, each of which is told."""
    changed: dict[str, Setting] = {}
    for switch, (values, reason) in IMPLIED.items():
        if not getattr(resolved.core, switch):
            continue
        unsaid = {key: value for key, value in values.items() if resolved.settings[key].origin == "default"}
        changed |= {
            key: replace(resolved.settings[key], value=value, origin=f"implied by {switch}")
            for key, value in unsaid.items()
        }
        if unsaid and os.environ.get("RANK", "0") == "0":
            told = " and ".join(f"{key} {value}" for key, value in unsaid.items())
            print(f"note: {switch} implies {told}: {reason}.", file=sys.stderr)
    core = replace(resolved.core, **{key: setting.value for key, setting in changed.items()})
    return replace(resolved, core=core, settings=dict(resolved.settings) | changed)
