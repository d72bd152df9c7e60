"""From arguments to a configuration: components found, values converted, the checkpoint followed."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from dataclasses import replace
from typing import TYPE_CHECKING

from panda.configuration.arguments import Arguments
from panda.configuration.options import DEFAULT_PLUGINS
from panda.configuration.options import IMPLIED
from panda.configuration.options import RunOptions
from panda.configuration.refusals import refuse
from panda.configuration.spellings import RENAMED
from panda.registry import Catalog
from panda.registry.resolve import Resolved
from panda.registry.resolve import Setting
from panda.registry.resolve import resolve

if TYPE_CHECKING:
    from panda.weights.pretrained import Pretrained


@dataclass(frozen=True)
class Configuration:
    """What a run was told: names are components, values have their types, the checkpoint is found."""

    resolved: Resolved
    catalog: Catalog
    pretrained: Pretrained | None
    """The checkpoint at ``ckpt_path``; nothing of its weights is read yet."""

    @property
    def options(self) -> RunOptions:
        """The options of every run."""
        options: RunOptions = self.resolved.core
        return options


def configure(arguments: Arguments) -> Configuration:
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
    if resolved.core.ckpt_path is None:
        return Configuration(resolved, catalog, None)

    from panda.configuration.following import follow_checkpoint
    from panda.weights.finding import find_pretrained

    pretrained = find_pretrained(resolved.core)
    assert pretrained is not None
    resolved = follow_checkpoint(resolved, pretrained)
    if os.environ.get("RANK", "0") == "0":
        print(f"weights: {pretrained.describe()}")
        print(f"tokenizer: {resolved.core.tokenizer} ({resolved.settings['tokenizer'].origin})")
    return Configuration(resolved, catalog, pretrained)


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
