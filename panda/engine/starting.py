"""What DeepSpeed does when an engine is made, and must not: while these are open it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_reports_of_memory() -> Iterator[None]:
    """Make DeepSpeed's function that reports memory do nothing in the meantime.

    The wrappers of 0.19.8 call it for each group of parameters, whatever the level of the logger, and it collects
    garbage before it prints: 60 s of the start of a LLaMA-65B with adapters (H100, 2026-11-26). Its code is replaced,
    since the wrappers have imported it by name. Can go when they call it only where it is asked for.
    """
    from deepspeed.runtime.utils import see_memory_usage

    code = see_memory_usage.__code__
    see_memory_usage.__code__ = _reports_nothing.__code__
    try:
        yield
    finally:
        see_memory_usage.__code__ = code


def _reports_nothing(message: str, force: bool = False) -> None:
    pass


@contextmanager
def without_effect(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Make ``optimizer.step()`` do nothing in the meantime.

    The 16-bit wrappers of DeepSpeed 0.19.8 without ZeRO (``FP16_UnfusedOptimizer``) take a step with zero
    gradients when they are made, to allocate the optimizer's state. That step counts for bias correction, and
    decays weights. Around ``initialize`` this can go when they no longer do.
    """
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del optimizer.step
