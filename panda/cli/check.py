"""``panda check``: resolves a configuration, and checks its data and model. Trains nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from panda.cli.command import run_command
from panda.cli.configured import configured
from panda.configuration.configure import Configuration
from panda.registry.resolve import Resolved

if TYPE_CHECKING:
    from panda.data.packing import Layout
    from panda.data.token_dataset import SampleSet
    from panda.run.preparation import Preparation

USAGE = """\
usage: panda check CONFIG [--KEY VALUE ...] [-p no:NAME]

Resolve a configuration as panda-train would, print each value with where it came from, load the
tokenizer, read and tokenise all the data, count the model's parameters; train nothing, and write
nothing but the token cache. What panda-train would refuse on this machine is refused, such as a model
that does not fit: for a run of several processes set WORLD_SIZE, as its launcher does.

examples:
  panda check configs/instruct-tiny.yaml --learning_rate 2e-3
  WORLD_SIZE=8 panda check run.yaml --zero_stage 3"""


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
        print(f"{chosen.label}: {chosen.offer.distribution} {chosen.offer.version}, {source}")
    for offer in resolved.hook_modules:
        print(f"plugin {offer.name}: {offer.distribution} {offer.version}, {offer.module}")


def _check_data_and_model(configuration: Configuration, world_size: int) -> None:
    from panda.engine.checkpoints.folders import START
    from panda.engine.checkpoints.folders import read_progress
    from panda.run.assembly import build_schedule
    from panda.run.assembly import lay_out
    from panda.run.continuation import agreement_of
    from panda.run.directory import find_directory
    from panda.run.preparation import prepare

    resolved, options = configuration.resolved, configuration.options
    directory, checkpoint = find_directory(resolved)
    prepared = prepare(configuration, world_size)
    agreement = agreement_of(resolved, prepared.pretrained, prepared.dataset)
    progress = read_progress(checkpoint, agreement) if checkpoint else START
    layout = lay_out(options, prepared.dataset, world_size // options.tensor_parallel_size, progress)
    build_schedule(resolved, layout.plan)
    _print_data(prepared.dataset, prepared.held_out)
    print(
        f"run: {layout.plan.total_steps:,} optimizer steps of {layout.plan.step_samples:,} samples on {world_size}"
        f" rank(s)\nrun: in {directory}" + (f", continuing from {checkpoint}" if checkpoint else "")
    )
    _print_model(prepared, layout)


def _print_data(dataset: SampleSet, held_out: SampleSet | None) -> None:
    print(f"\ndata: {dataset.report.files} files, {dataset.report.rows:,} rows")
    for line in dataset.report.lines():
        print(f"data: {line}")
    print(f"data: {len(dataset):,} samples, {dataset.tokens:,} tokens, {dataset.supervised_tokens:,} with loss")
    if held_out:
        for line in held_out.report.lines():
            print(f"evaluation data: {line}")
        print(f"evaluation data: {len(held_out):,} samples, {held_out.supervised_tokens:,} tokens with loss")


def _print_model(prepared: Preparation, layout: Layout) -> None:
    import torch

    from panda.models.adapters.lora import add_adapters
    from panda.models.forward.isolation import refuse_without_positions

    outline, options = prepared.outline, prepared.options
    if outline is None:
        print("model: it can only be built with weights, so its size is not known before a run")
        return
    if layout.packed:
        refuse_without_positions(outline, prepared.resolved.components["model"].component.name)
    parameters = sum(parameter.numel() for parameter in outline.parameters())
    if options.use_lora:
        with torch.device("meta"):
            outline = add_adapters(outline, options)
    trained = sum(parameter.numel() for parameter in outline.parameters() if parameter.requires_grad)
    print(f"model: {parameters:,} parameters" + (f"; {trained:,} of adapters are trained" * options.use_lora))
