"""Learning-rate schedules: a factor of the peak as a function of completed optimizer steps.

During a warm-up of W steps, the step after s completed ones has the factor (s + 1) / W. With the s / W
of transformers and DeepSpeed, the first step of every run does nothing. The schedules have PandaLLM's
names; ``wsd`` is an addition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Annotated
from typing import Any
from typing import Literal

from panda.registry import Meta
from panda.registry import UserError
from panda.registry import register_lr_scheduler
from panda.registry.contexts import LRSchedulerContext

Schedule = Callable[[int], float]
"""Maps the number of completed optimizer steps to a factor of the peak learning rate."""


MOST_TRIED = 100_000
"""Steps of a run for which its schedule is tried before the run begins: in some 50 ms."""


def steps_to_try(total: int) -> Iterable[int]:
    """Numbers of completed steps: all of a run of ``total`` steps, or so many of them, with the first and the last."""
    if total <= MOST_TRIED:
        return range(total)
    return (number * (total - 1) // (MOST_TRIED - 1) for number in range(MOST_TRIED))


def is_factor(value: Any) -> bool:
    """Whether ``value``, which a schedule returned, is a number, finite and not negative: no tensor of one."""
    return isinstance(value, Real) and 0 <= float(value) < math.inf


@dataclass(frozen=True)
class WarmupOptions:
    """Options of a schedule that warms up."""

    warmup_steps: Annotated[int, Meta(ge=0, le=10**9)] = 50
    """Optimizer steps over which the learning rate rises to its peak."""
    warmup_proportion: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Length of the warm-up as a fraction of all steps, which changes with the length of the run; if it is not 0,
    warmup_steps is ignored."""


@dataclass(frozen=True)
class CosineOptions(WarmupOptions):
    """Options of the cosine schedule."""

    min_lr_ratio: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Learning rate at the end, as a fraction of the peak."""


@dataclass(frozen=True)
class WSDOptions(WarmupOptions):
    """Options of warm-up, stable, decay."""

    decay_proportion: Annotated[float, Meta(gt=0, le=1)] = 0.2
    """Fraction of all steps, at the end of the run, over which the learning rate falls."""
    decay_shape: Literal["sqrt", "linear"] = "sqrt"
    """How it falls, with x from 0 to 1 over the decay: as 1 - sqrt(x) (arXiv 2405.18392), or as 1 - x."""
    min_lr_ratio: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Learning rate at the end, as a fraction of the peak."""


@dataclass(frozen=True)
class PolyOptions(WarmupOptions):
    """Options of the polynomial schedule."""

    power: Annotated[float, Meta(gt=0)] = 1.0
    """Exponent of the decay; 1 is linear."""
    lr_end: Annotated[float, Meta(ge=0)] = 1e-7
    """Learning rate at the end."""


@register_lr_scheduler("warmup", options=WarmupOptions)
def warmup(options: WarmupOptions, context: LRSchedulerContext) -> Schedule:
    """Linear warm-up to the peak, then the peak."""
    return _after_warmup(options, context, lambda progress: 1.0)


@register_lr_scheduler("constant", options=WarmupOptions)
def constant(options: WarmupOptions, context: LRSchedulerContext) -> Schedule:
    """Linear warm-up to the peak, then the peak; the same as warmup."""
    return warmup(options, context)


@register_lr_scheduler("linear", options=WarmupOptions)
def linear(options: WarmupOptions, context: LRSchedulerContext) -> Schedule:
    """Linear warm-up to the peak, then linear decay to 0 at the end of the run."""
    return _after_warmup(options, context, lambda progress: 1.0 - progress)


@register_lr_scheduler("cosine", options=CosineOptions)
def cosine(options: CosineOptions, context: LRSchedulerContext) -> Schedule:
    """Linear warm-up to the peak, then half a cosine down to min_lr_ratio of it at the end of the run."""
    end = options.min_lr_ratio

    def decay(progress: float) -> float:
        return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return _after_warmup(options, context, decay)


@register_lr_scheduler("wsd", options=WSDOptions)
def wsd(options: WSDOptions, context: LRSchedulerContext) -> Schedule:
    """Linear warm-up to the peak, then the peak, and in the last steps decay to min_lr_ratio (arXiv 2404.06395).

    With warmup_steps, the curve does not depend on the length of the run until the decay. So a checkpoint
    from before the decay can be resumed with another max_steps, as if the run had been planned for it. With
    warmup_proportion, the warm-up is longer in a longer run: only a checkpoint from after both can be.
    """
    total, end = context.total_steps, options.min_lr_ratio
    start = max(_warm_steps(options, context), total - round(total * options.decay_proportion))

    def factor(completed: int) -> float:
        part = min(1.0, max(0, completed - start) / max(1, total - start))
        fallen = math.sqrt(part) if options.decay_shape == "sqrt" else part
        return 1.0 - (1.0 - end) * fallen

    stable = warmup(options, context)
    return lambda completed: factor(completed) if completed > start else stable(completed)


@register_lr_scheduler("poly", options=PolyOptions)
def poly(options: PolyOptions, context: LRSchedulerContext) -> Schedule:
    """Linear warm-up to the peak, then polynomial decay to lr_end at the end of the run."""
    if options.lr_end >= context.learning_rate:
        raise UserError(f"lr_end {options.lr_end} has to be less than learning_rate {context.learning_rate}.")
    end = options.lr_end / context.learning_rate
    return _after_warmup(options, context, lambda progress: (1.0 - end) * (1.0 - progress) ** options.power + end)


def _after_warmup(options: WarmupOptions, context: LRSchedulerContext, decay: Callable[[float], float]) -> Schedule:
    """``decay`` maps the completed fraction of the steps after the warm-up, 0 to 1, to a factor."""
    total, warm = context.total_steps, _warm_steps(options, context)

    def factor(completed: int) -> float:
        if completed < warm:
            return (completed + 1) / warm
        return decay(min(1.0, (completed - warm) / max(1, total - warm)))

    return factor


def _warm_steps(options: WarmupOptions, context: LRSchedulerContext) -> int:
    share = options.warmup_proportion
    return round(context.total_steps * share) if share else options.warmup_steps
