"""Arguments to a resolved configuration: what panda-train, panda check and --help share."""

from __future__ import annotations

import os
import sys

from panda.cli.arguments import Arguments
from panda.cli.arguments import parse_arguments
from panda.refusals import refuse
from panda.registry import Catalog
from panda.registry import UserError
from panda.registry.hooks import Hooks
from panda.registry.hooks import live_hooks
from panda.registry.resolve import Resolved
from panda.registry.resolve import resolve
from panda.run_options import DEFAULT_PLUGINS
from panda.run_options import IMPLIED
from panda.run_options import RENAMED
from panda.run_options import RunOptions


def configure(arguments: Arguments) -> tuple[Resolved, Hooks]:
    """Resolve ``arguments`` against what is installed, with the hooks that are live then.

    Raises UserError; imports no torch.
    """
    catalog = Catalog(arguments.blocked)
    for name in catalog.unused_blocks():
        print(
            f"warning: -p no:{name}: no distribution, module or plugin that is installed has that name.",
            file=sys.stderr,
        )
    resolved = resolve(catalog, RunOptions, arguments.given, default_plugins=DEFAULT_PLUGINS, renamed=RENAMED)
    hooks = live_hooks(resolved)
    resolved = _with_implied(resolved)
    refuse(resolved)
    if resolved.core.ckpt_path is not None:
        from panda.models.finding import find_pretrained
        from panda.models.following import follow_checkpoint

        resolved = follow_checkpoint(resolved)
        pretrained = find_pretrained(resolved.core)
        if pretrained and os.environ.get("RANK", "0") == "0":
            print(f"weights: {pretrained.describe()}")
            print(f"tokenizer: {resolved.core.tokenizer} ({resolved.settings['tokenizer'].origin})")
    return resolved, hooks


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
    """``resolved`` with the defaults that its switches imply, each of which is reported."""
    for switch, (values, reason) in IMPLIED.items():
        if not getattr(resolved.core, switch):
            continue
        unsaid = {key: value for key, value in values.items() if resolved.settings[key].origin == "default"}
        resolved = resolved.with_values(unsaid, f"implied by {switch}")
        if unsaid and os.environ.get("RANK", "0") == "0":
            told = " and ".join(f"{key} {value}" for key, value in unsaid.items())
            print(f"note: {switch} implies {told}: {reason}.", file=sys.stderr)
    return resolved
