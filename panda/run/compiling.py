"""Whether compiled layers save a run more time than it takes to compile them: `compile: auto` on a GPU.

The rule has four figures, which were measured on one card (docs/machines.md). Work counts as the operations of the
model: what a small model waits for besides, it would save too, and is not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import replace

from panda.configuration.options import RunOptions
from panda.configuration.refusals import REFUSALS
from panda.files.terminal import number_of
from panda.registry.resolve import Resolved
from panda.run.cards import CARDS
from panda.run.cards import Card
from panda.run.estimate import ModelMemory

COST = 30.0
"""Seconds that compiling takes, at the start of a run (LoRA 7B: 25 to 30 s to the first step, 50 to 60 compiled)."""
SAVED = 0.3
"""Share of a step that compiled layers save (LoRA 7B: 0.67 to 0.45 s; 1.3B in full: 1.46 to 1.05 s)."""
REACHED = 0.375
"""Share of the card's peak that the same steps reach without."""
EARNED = 2.0
"""A run is compiled if that is estimated to save this many times what it costs."""


@dataclass(frozen=True)
class Work:
    """What a run computes."""

    steps: int | None
    """Its optimizer steps; None where they are not known, as without data."""
    positions: float
    """Positions of the rows of a step on each GPU, padding too."""
    length: float
    """Tokens of a sample."""


@dataclass(frozen=True)
class Choice:
    """Whether a run is compiled."""

    compile: bool
    why: str
    """Empty where it was given or decided before."""
    begins: int | None = None
    """The least number of steps with which it is; None where it is not with any."""


def choice(resolved: Resolved, model: ModelMemory | None, card: Card, work: Work) -> Choice:
    """Whether the run of ``resolved`` is compiled on ``card``. A run of unknown length is taken for a long one."""
    if resolved.core.compile != "auto":
        return Choice(resolved.core.compile, "")
    against = _what_forbids(resolved, model)
    if against or model is None:
        return Choice(False, against)
    # A card whose speed is not known counts as the fastest one: compiling has to earn most there.
    peak = card.peak or max(known.peak for known in CARDS.values() if known.peak)
    seconds = work.positions * model.flops(work.length) / (REACHED * peak * resolved.core.tensor_parallel_size)
    begins = math.ceil(EARNED * COST / (SAVED * seconds))
    if work.steps is None:
        return Choice(True, f"it pays from {number_of(begins, 'step')} on", begins)
    earns, whole = work.steps >= begins, seconds * work.steps
    saved = f"{'saves' if earns else 'would save'} about {SAVED * whole:,.0f} of {whole:,.0f} s"
    why = f"it takes about {COST:.0f} s, and {saved} in {number_of(work.steps, 'step')}"
    return Choice(earns, why if earns else f"{why}; it is done from {number_of(begins, 'step')} on", begins)


def as_chosen(resolved: Resolved, model: ModelMemory, card: Card, work: Work | None = None) -> RunOptions:
    """The options of ``resolved`` with `compile` chosen; by default for a long run."""
    options: RunOptions = resolved.core
    return replace(options, compile=choice(resolved, model, card, work or long_run(options)).compile)


def long_run(options: RunOptions) -> Work:
    """The work of a run with ``options`` whose data is not read: full rows, and as many steps as they say, if any."""
    rows = options.per_gpu_train_batch_size * options.gradient_accumulation_steps
    steps = options.max_steps if options.max_steps > 0 else None
    return Work(steps, rows * options.max_seq_length, options.max_seq_length)


def _what_forbids(resolved: Resolved, model: ModelMemory | None) -> str:
    """Why the run is not compiled, however long it is; empty if it can be."""
    options: RunOptions = resolved.core
    compiled, plain = (replace(resolved, core=replace(options, compile=yes)) for yes in (True, False))
    refused = [refusal.what for refusal in REFUSALS if refusal.refuses(compiled) and not refusal.refuses(plain)]
    if refused:
        return f"{refused[0]} is refused"
    offer = resolved.components["model"].offer
    if not offer.is_own:
        return f"the model is of {offer.distribution}, and not known to work compiled"
    if model is None or not model.footprint.layers:
        return "the model has no layers that could be compiled each by itself"
    if model.footprint.approximate:  # experts, or code that does not run without data
        return "the model is not known to work compiled"
    if options.use_quant and options.quant_bits == 8:
        return "8 bits are not known to work compiled"
    return ""
