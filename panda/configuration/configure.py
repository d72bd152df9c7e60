"""From arguments to a configuration: components found, values converted, the checkpoint followed."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from panda.configuration.arguments import Arguments
from panda.configuration.implied import checkpoint_alone
from panda.configuration.implied import model_of_checkpoint
from panda.configuration.options import DEFAULT_PLUGINS
from panda.configuration.options import IMPLIED
from panda.configuration.options import RunOptions
from panda.configuration.refusals import refuse
from panda.configuration.spellings import LAUNCHERS
from panda.configuration.spellings import RENAMED
from panda.configuration.translation.translate import advice
from panda.configuration.user_code import catalog_of
from panda.registry import Catalog
from panda.registry.hooks import Hooks
from panda.registry.hooks import live_hooks
from panda.registry.options import Given
from panda.registry.resolve import Resolved
from panda.registry.resolve import resolve
from panda.registry.resolve import resolve_model

if TYPE_CHECKING:
    from panda.weights.pretrained import Pretrained


@dataclass(frozen=True)
class Configuration:
    """The configuration of a run: components in place of names, typed values, and the checkpoint that was found."""

    resolved: Resolved
    hooks: Hooks
    """The hooks in the modules of the chosen components. Objects that plugins make are added when the run starts."""
    pretrained: Pretrained | None
    """The checkpoint at ``ckpt_path``, of which no weights have been read yet."""

    @property
    def options(self) -> RunOptions:
        """The options of every run."""
        options: RunOptions = self.resolved.core
        return options


def configure(arguments: Arguments) -> Configuration:
    """Resolve ``arguments`` against what is installed. Raises UserError; imports no torch."""
    catalog = catalog_of(arguments)
    for name in catalog.unused_blocks():
        print(
            f"warning: -p no:{name}: no installed distribution, module or plugin has that name.",
            file=sys.stderr,
        )
    given = arguments.given
    pretrained = checkpoint_alone(given)
    if pretrained:
        name = model_of_checkpoint(pretrained, catalog)
        given = given | {"model": Given(name, f"checkpoint {pretrained.folder}", name)}
    renamed = advice(given) | RENAMED | LAUNCHERS
    resolved = resolve(
        catalog,
        RunOptions,
        given,
        default_plugins=DEFAULT_PLUGINS,
        renamed=renamed,
        recorded=arguments.recorded,
        changed=arguments.changed,
    )
    for warning in resolved.warnings if os.environ.get("RANK", "0") == "0" else ():
        print(f"warning: {warning}", file=sys.stderr)
    hooks = live_hooks(resolved)
    resolved = _with_implied(resolved)
    if resolved.core.ckpt_path is None:
        refuse(resolved)
        return Configuration(resolved, hooks, None)

    from panda.configuration.from_checkpoint import follow_checkpoint
    from panda.weights.finding import find_pretrained

    pretrained = pretrained or find_pretrained(resolved.core)
    assert pretrained is not None
    if pretrained.adapters and resolved.settings["use_lora"].origin == "default":
        resolved = resolved.with_values({"use_lora": True}, f"adapters {pretrained.adapters}")
    refuse(resolved)
    return Configuration(follow_checkpoint(resolved, pretrained), hooks, pretrained)


def configure_model(arguments: Arguments) -> Configuration:
    """The core options and the model of ``arguments``, the configuration of a run: nothing else of it is looked for.

    No file of the user is executed. Raises UserError; imports no torch.
    """
    catalog = Catalog(arguments.blocked, api=arguments.api, runs_files=False)
    resolved = resolve_model(catalog, RunOptions, arguments.given)
    if resolved.core.ckpt_path is None:
        return Configuration(resolved, Hooks(), None)

    from panda.configuration.from_checkpoint import follow_checkpoint
    from panda.weights.finding import find_pretrained

    pretrained = find_pretrained(resolved.core)
    assert pretrained is not None
    return Configuration(follow_checkpoint(resolved, pretrained), Hooks(), pretrained)


def _with_implied(resolved: Resolved) -> Resolved:
    """``resolved`` with the defaults that its switches imply; prints each."""
    for switch, (values, reason) in IMPLIED.items():
        if not getattr(resolved.core, switch):
            continue
        implied = {key: value for key, value in values.items() if resolved.settings[key].origin == "default"}
        resolved = resolved.with_values(implied, f"implied by {switch}")
        if implied and os.environ.get("RANK", "0") == "0":
            named = " and ".join(f"{key} {value}" for key, value in implied.items())
            print(f"note: {switch} implies {named}: {reason}.", file=sys.stderr)
    return resolved
