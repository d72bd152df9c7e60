"""``panda check``: resolves a configuration, and checks its data and model. Trains nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING
from typing import Any

from panda.cli.command import run_command
from panda.cli.configured import configured
from panda.configuration.configure import Configuration
from panda.files.activity import activity
from panda.files.terminal import fitted
from panda.files.terminal import number_of
from panda.registry.resolve import Resolved
from panda.run.first_look import load

if TYPE_CHECKING:
    from panda.run.preparation import Preparation

USAGE = """\
usage: panda check CONFIG [--KEY VALUE ...] [-p no:NAME]

Resolve a configuration as panda-train would, print each value with where it
came from, load the tokenizer, read and tokenise all the data, count the
model's parameters; train nothing, and write nothing but the token cache. What
panda-train would refuse on this machine is refused, such as a model that does
not fit: for a run of several processes set WORLD_SIZE, as its launcher does.

examples:
  panda check panda:configs/instruct-tiny.yaml --learning_rate 2e-3
  WORLD_SIZE=8 panda check panda:configs/instruct-tiny.yaml --zero_stage 3"""


LONG_VALUE = 16
"""Characters of a value beyond which it does not widen the column of values."""
INDENT = 30
"""Columns to which the rest of a line that is too long for a terminal is set in, at most."""
TRIED_LATER = "not tried yet: whether the model looks ahead or lacks logits; training does so before its first step"


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda check``."""
    return run_command(_check, argv)


def _check(argv: list[str]) -> None:
    configuration = configured(argv, USAGE)
    if configuration is None:
        return

    from panda.run.first_look import look_first
    from panda.run.first_look import planned_world_size

    world_size = planned_world_size(configuration)
    _print_settings(configuration.resolved)
    look_first(configuration, world_size)
    _check_data_and_model(configuration, world_size)


def _print_settings(resolved: Resolved) -> None:
    for owner in dict.fromkeys(setting.owner for setting in resolved.settings.values()):
        print(f"{owner}:")
        settings = {key: setting for key, setting in resolved.settings.items() if setting.owner == owner}
        shown = {key: _shown(setting.value) for key, setting in settings.items()}
        width = max(map(len, shown))
        most = max((len(text) for text in shown.values() if len(text) <= LONG_VALUE), default=0)
        for key, setting in settings.items():
            line = f"  {key:{width}}  {shown[key]:{most}}  {setting.origin}".rstrip()
            print("\n".join(fitted([line], min(width, INDENT) + 4)))
    print()
    for chosen in resolved.chosen:
        source = "{}:{}".format(*chosen.component.source)
        print("\n".join(fitted([f"{chosen.label}: {chosen.offer.provider}, {source}"], 4)))
    for offer in resolved.hook_modules:
        print(f"plugin {offer.name}: {offer.provider}, {offer.file or offer.module}")


def _patterns(prepared: Preparation) -> Iterator[tuple[str, str]]:
    """What patterns of names of parameters match, with labels. Raises UserError for one that matches none."""
    from panda.configuration.options import rate_multipliers
    from panda.engine.freezing import matching
    from panda.engine.freezing import trained_names
    from panda.hooks.freeze import FreezeOptions
    from panda.hooks.freeze import stretches
    from panda.optim.param_groups import refuse_unmatched

    model = prepared.adapted or prepared.outline
    if model is None:  # it can only be built with its weights
        return
    parts = prepared.parts_of(prepared.outline) if prepared.outline is not None else {}
    of_parts = [f"{part}.{name}" for part, module in parts.items() for name in trained_names(module)]
    every = [name for name, _ in model.named_parameters()]
    refuse_unmatched(rate_multipliers(prepared.options.lr_multipliers), [*every, *of_parts])
    for plugin in prepared.resolved.plugins:
        for each in stretches(plugin.options.freeze) if isinstance(plugin.options, FreezeOptions) else ():
            found = number_of(len(matching([*trained_names(model), *of_parts], [each.pattern])), "parameter")
            yield "frozen", f"{found} by {each.pattern!r}, {each.when}"


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else str(value)
    return repr(value) if isinstance(value, str) and value != value.strip() else text


def _check_data_and_model(configuration: Configuration, world_size: int) -> None:
    print()
    load("panda.run.continuation")  # and DeepSpeed with it, which the first import below would load in silence

    from panda.engine.checkpoints.manifest import START
    from panda.engine.checkpoints.manifest import read_progress
    from panda.models.forward.isolation import refuse_without_positions
    from panda.run.assembly import lay_out
    from panda.run.continuation import agreement_of
    from panda.run.directory import find_directory
    from panda.run.outlook import LABEL_WIDTH
    from panda.run.outlook import outlook
    from panda.run.preparation import add_plugins
    from panda.run.preparation import prepare

    add_plugins(configuration)
    directory, checkpoint = find_directory(configuration.resolved)
    with activity("preparing data and model"):
        prepared = prepare(configuration, world_size, evaluates=True)
        prepared.decide()
    resolved, options = prepared.resolved, prepared.options
    agreement = agreement_of(resolved, prepared.pretrained, prepared.dataset)
    progress = read_progress(checkpoint, agreement) if checkpoint else START
    layout = lay_out(options, prepared.dataset, world_size // options.tensor_parallel_size, progress)
    if layout.packed and prepared.outline is not None:
        refuse_without_positions(prepared.outline, resolved.components["model"].component.name)
    print("\n".join(fitted(outlook(prepared, layout, directory, checkpoint), LABEL_WIDTH)))
    for label, line in _patterns(prepared):
        print("\n".join(fitted([f"{label:{LABEL_WIDTH}}{line}"], LABEL_WIDTH)))
    print("\n".join(fitted([TRIED_LATER], 4)))
