"""``panda check``: resolves a configuration, and checks its data and model. Trains nothing."""

from __future__ import annotations

from panda.cli.command import run_command
from panda.cli.configured import configured
from panda.configuration.configure import Configuration
from panda.registry.resolve import Resolved
from panda.run.first_look import announce_loading

USAGE = """\
usage: panda check CONFIG [--KEY VALUE ...] [-p no:NAME]

Resolve a configuration as panda-train would, print each value with where it came from, load the
tokenizer, read and tokenise all the data, count the model's parameters; train nothing, and write
nothing but the token cache. What panda-train would refuse on this machine is refused, such as a model
that does not fit: for a run of several processes set WORLD_SIZE, as its launcher does.

examples:
  panda check panda:configs/instruct-tiny.yaml --learning_rate 2e-3
  WORLD_SIZE=8 panda check panda:configs/instruct-tiny.yaml --zero_stage 3"""


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
    width = max(map(len, resolved.settings))
    owner = None
    for key, setting in resolved.settings.items():
        if setting.owner != owner:
            owner = setting.owner
            print(f"{owner}:")
        value = ", ".join(map(str, setting.value)) if isinstance(setting.value, tuple) else setting.value
        shown = repr(value) if isinstance(value, str) and value != value.strip() else value
        print(f"  {key:{width}}  {'' if shown is None else shown!s:24}  {setting.origin}".rstrip())
    print()
    for chosen in resolved.chosen:
        source = "{}:{}".format(*chosen.component.source)
        print(f"{chosen.label}: {chosen.offer.provider}, {source}")
    for offer in resolved.hook_modules:
        print(f"plugin {offer.name}: {offer.provider}, {offer.file or offer.module}")


def _check_data_and_model(configuration: Configuration, world_size: int) -> None:
    print()
    announce_loading()

    from panda.engine.checkpoints.folders import START
    from panda.engine.checkpoints.folders import read_progress
    from panda.models.forward.isolation import refuse_without_positions
    from panda.run.assembly import lay_out
    from panda.run.continuation import agreement_of
    from panda.run.directory import find_directory
    from panda.run.outlook import outlook
    from panda.run.preparation import prepare

    directory, checkpoint = find_directory(configuration.resolved)
    prepared = prepare(configuration, world_size)
    prepared.decide()
    resolved, options = prepared.resolved, prepared.options
    agreement = agreement_of(resolved, prepared.pretrained, prepared.dataset)
    progress = read_progress(checkpoint, agreement) if checkpoint else START
    layout = lay_out(options, prepared.dataset, world_size // options.tensor_parallel_size, progress)
    if layout.packed and prepared.outline is not None:
        refuse_without_positions(prepared.outline, resolved.components["model"].component.name)
    print("\n".join(outlook(prepared, layout, directory, checkpoint)))
    print(TRIED_LATER)
