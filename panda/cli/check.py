"""``panda check``: what a configuration means, and whether its data is there. Trains nothing."""

from __future__ import annotations

import os

from panda.cli.command import run_command
from panda.cli.configuration import configured
from panda.engine.deepspeed_config import deepspeed_config
from panda.registry.resolve import Resolved

USAGE = """\
usage: panda check CONFIG [--KEY VALUE ...] [-p no:NAME]

Resolve a configuration as panda-train would, print each value with where it came from, load the
tokenizer, read and tokenise all the data, count the model's parameters; train nothing, and write
nothing but the token cache.

example: panda check configs/instruct-tiny.yaml --learning_rate 2e-3"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``panda check``."""
    return run_command(_check, argv)


def _check(argv: list[str]) -> None:
    resolved = configured(argv, USAGE)
    if resolved is None:
        return
    _print_settings(resolved)
    world_size = int(os.environ.get("WORLD_SIZE", resolved.core.tensor_parallel_size))
    deepspeed_config(resolved.core, world_size=world_size, on_gpu=False)  # before torch is imported, for its errors
    _check_data_and_model(resolved, world_size)


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


def _check_data_and_model(resolved: Resolved, world_size: int) -> None:
    from panda.assembly import build_evaluation_task
    from panda.assembly import build_outline
    from panda.assembly import build_schedule
    from panda.assembly import build_task
    from panda.assembly import lay_out
    from panda.assembly import load_tokenizer
    from panda.assembly import model_context
    from panda.assembly import refuse_splitting
    from panda.engine.checkpoint_folders import START
    from panda.engine.checkpoint_folders import read_progress
    from panda.models.adapters import add_adapters
    from panda.models.finding import find_pretrained
    from panda.models.isolation import refuse_without_positions
    from panda.models.pretrained import fitted
    from panda.run_directory import find_directory

    tensor_ranks = resolved.core.tensor_parallel_size
    directory, checkpoint = find_directory(resolved)
    tokenizer = load_tokenizer(resolved.core.tokenizer)
    task = build_task(resolved, tokenizer)
    evaluated = build_evaluation_task(resolved, task)
    pretrained = find_pretrained(resolved.core)
    context = model_context(resolved, tokenizer, pretrained)
    if outline := build_outline(resolved, context):
        refuse_splitting(outline, resolved)
        if pretrained:
            fitted(outline, pretrained)
    dataset = task.dataset()
    progress = read_progress(checkpoint, {}) if checkpoint else START
    layout = lay_out(resolved.core, dataset, world_size // tensor_ranks, progress)
    plan = layout.plan
    build_schedule(resolved, plan)
    print(f"\ndata: {dataset.report.files} files, {dataset.report.rows:,} rows")
    for line in dataset.report.lines():
        print(f"data: {line}")
    print(
        f"data: {len(dataset):,} samples, {dataset.tokens:,} tokens, {dataset.supervised_tokens:,} with loss\n"
        f"run: {plan.total_steps:,} optimizer steps of {plan.step_samples:,} samples on {world_size} rank(s)"
    )
    if evaluated:
        held_out = evaluated.dataset()
        for line in held_out.report.lines():
            print(f"evaluation data: {line}")
        print(f"evaluation data: {len(held_out):,} samples, {held_out.supervised_tokens:,} tokens with loss")
    print(f"run: in {directory}" + (f", on from {checkpoint}" if checkpoint else ""))

    import torch

    if outline is None:
        print("model: it wants weights while it is made, so how many it has is not known before a run")
        return
    if layout.packed:
        refuse_without_positions(outline, resolved.components["model"].component.name)
    parameters = sum(parameter.numel() for parameter in outline.parameters())
    if resolved.core.use_lora:
        with torch.device("meta"):
            outline = add_adapters(outline, resolved.core)
    trained = sum(parameter.numel() for parameter in outline.parameters() if parameter.requires_grad)
    print(f"model: {parameters:,} parameters" + (f"; {trained:,} of adapters are trained" * resolved.core.use_lora))
