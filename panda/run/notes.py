"""What of a run may not be meant: the notes after its first lines."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from panda.data.packing import Layout
from panda.files.terminal import number_of
from panda.optim.adam_options import AdamOptions
from panda.optim.schedules import WarmupOptions
from panda.registry import UserError
from panda.run.assembly import build_schedule
from panda.run.preparation import Preparation
from panda.weights.tokenizers import read_tokenizer
from panda.weights.tokenizers import tokenizer_folder

HIGH_RATE = 1e-4
"""Peak learning rate from which on training all weights of a checkpoint with Adam is noted.

Published recipes of supervised fine-tuning have 5e-6 to 5e-5: Alpaca, Llama 2 and TRL's default 2e-5, Tulu 3 5e-6,
transformers' default 5e-5. Only models of a few hundred million weights are tuned at more.
"""
HIGH_ADAPTER_RATE = 1e-3
"""The same for adapters, which have rates ten times as high: LoRA and QLoRA (arXiv 2305.14314) 1e-4 to 3e-4. Noted
above this."""
PEAK_SOUGHT_STEPS = 10_000
"""Steps among which the peak of the learning rate is sought: a warm-up is thought to be shorter."""


def notes(prepared: Preparation, layout: Layout, before: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Each thing about the run of ``prepared`` that its user may not mean, in a line.

    ``before``: what provenance.json says of the run that it continues.
    """
    before = before or {}
    yield from _tokenizer_note(prepared)
    yield from _rate_note(prepared)
    yield from _evaluation_note(prepared)
    plan = layout.plan
    if plan.total_steps - plan.start_step == 1 and 0 < plan.first_samples < plan.step_samples:
        yield (
            f"all {number_of(plan.first_samples, 'sample')} are one step, which is for {plan.step_samples}: lower"
            " gradient_accumulation_steps, or raise num_train_epochs, to take more"
        )
    yield from _steps_note(prepared, layout, before)
    yield from _warm_up_note(prepared, layout, before.get("total_steps"))
    schedule, steps = build_schedule(prepared.resolved, layout.plan.total_steps), layout.plan.total_steps
    before_last = range(min(max(steps - 1, 1), PEAK_SOUGHT_STEPS))
    if layout.plan.start_step < steps and max(map(schedule, before_last)) < 1:
        yield "the run ends within the warm-up: the learning rate is below its peak until the last step"


def _tokenizer_note(prepared: Preparation) -> Iterator[str]:
    if prepared.pretrained is None or has_own_tokenizer(prepared):
        return
    holder = prepared.pretrained.with_tokenizer()
    if holder is None:
        yield "the checkpoint has no tokenizer of its own: panda cannot see whether this one belongs to its weights"
        return
    try:
        theirs = read_tokenizer(holder.folder).get_vocab()
    except UserError:
        yield f"the tokenizer in {holder.folder} cannot be read: panda cannot see whether this one is the same"
        return
    entries = prepared.tokenizer.get_vocab()
    other = sum(theirs.get(entry) != number for entry, number in entries.items())
    if other:
        share = f"{other:,} of the {len(entries):,} entries of this tokenizer"
        meaning = "; the checkpoint's embeddings mean nothing to it" if other == len(entries) else ""
        yield f"{share} have another id in the checkpoint's own, or none{meaning}"


def _rate_note(prepared: Preparation) -> Iterator[str]:
    options, optimizer = prepared.options, prepared.resolved.components["optimizer"]
    if prepared.pretrained is None or type(optimizer.options) is not AdamOptions:
        return  # LAMB's rate, with options derived from Adam's, is relative to the norm of a weight
    rate = f"learning_rate {options.learning_rate:g} is high for"
    if options.use_lora:
        if options.learning_rate > HIGH_ADAPTER_RATE:
            yield f"{rate} adapters: 1e-4 to 1e-3 are usual"
    elif options.learning_rate >= HIGH_RATE:
        yield f"{rate} full fine-tuning of a checkpoint: 1e-6 to 5e-5 are usual"


def _steps_note(prepared: Preparation, layout: Layout, before: Mapping[str, Any]) -> Iterator[str]:
    plan, samples, steps = layout.plan, before.get("step_samples"), before.get("total_steps")
    if not isinstance(samples, int) or not isinstance(steps, int) or samples == plan.step_samples:
        return
    now = build_schedule(prepared.resolved, plan.total_steps)(plan.start_step)
    then = build_schedule(prepared.resolved, max(steps, plan.start_step + 1))(plan.start_step)
    rate = prepared.options.learning_rate
    yield (
        f"a step has {number_of(plan.step_samples, 'sample')}, and had {samples:,}, so the run has"
        f" {number_of(plan.total_steps, 'step')} in place of {steps:,}: the learning rate of step"
        f" {plan.start_step + 1:,} is {rate * now:.3g}, and would have been {rate * then:.3g}"
    )


def _warm_up_note(prepared: Preparation, layout: Layout, before: int | None) -> Iterator[str]:
    plan, options = layout.plan, prepared.resolved.components["lr_scheduler"].options
    if before is None or before == plan.total_steps or not isinstance(options, WarmupOptions):
        return
    warm = round(options.warmup_proportion * plan.total_steps)
    if plan.start_step < warm:
        yield (
            f"warmup_proportion: the run had {number_of(before, 'step')} and has {plan.total_steps:,}, of which"
            f" {warm:,} are the warm-up: the learning rate is still rising after step {plan.start_step:,}."
            " `warmup_steps` makes it the same in a run of any length"
        )


def _evaluation_note(prepared: Preparation) -> Iterator[str]:
    """Of classes of others that may act on evaluations, which only their instances are asked for otherwise."""
    options = prepared.options
    if options.eval_data_dir is not None or options.eval_fraction:
        return
    for each in prepared.resolved.plugins:
        factory = each.component.factory
        if hasattr(factory, "panda_evaluation") and getattr(factory, "acts", True) and not each.offer.is_own:
            yield (
                f"{each.label} has the hook panda_evaluation, and this run is never evaluated: set `eval_steps`, and"
                " `eval_data_dir` or `eval_fraction`"
            )


def has_own_tokenizer(prepared: Preparation) -> bool:
    """Whether the run has the tokenizer of its checkpoint."""
    if prepared.pretrained is None:
        return False
    if prepared.resolved.settings["tokenizer"].origin.startswith("checkpoint "):
        return True
    holder = prepared.pretrained.with_tokenizer()
    return holder is not None and tokenizer_folder(prepared.options.tokenizer).resolve() == holder.folder.resolve()
