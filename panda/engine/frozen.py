"""Frozen models beside the one that is trained: placed, under ZeRO-3 partitioned like it, and run without gradients."""

from __future__ import annotations

from typing import Any

import torch

from panda.configuration.options import RunOptions
from panda.engine.processes import Processes
from panda.engine.starting import without_reports_of_memory

_KEPT = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "bf16", "fp16")
"""Of DeepSpeed's configuration of a run, what a frozen model is given besides its partitioning."""


class FrozenModel:
    """A model in evaluation mode, called like it, without gradients. Under ZeRO-3 all ranks must call it together."""

    training = False

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    @torch.no_grad()
    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.module(*arguments, **keywords)


class WithoutAdapters:
    """The base of a model with adapters, called like it: the model itself, with its adapters off."""

    training = False

    def __init__(self, module: Any) -> None:
        """``module``: peft's wrapper of the model that is trained."""
        self.module = module

    @torch.no_grad()
    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        was_training = self.module.training
        self.module.eval()
        try:
            with self.module.disable_adapter():
                return self.module(*arguments, **keywords)
        finally:
            self.module.train(was_training)


def freeze(module: torch.nn.Module, options: RunOptions, config: dict[str, Any], processes: Processes) -> FrozenModel:
    """``module``, whose weights are placed, as a frozen model. ``config`` is DeepSpeed's for the run.

    Every rank must call this.
    """
    module.requires_grad_(False).eval()
    if options.zero < 3:
        dtype = None if options.precision == "fp32" else getattr(torch, options.dtype_name)
        return FrozenModel(module.to(processes.device, dtype))
    import deepspeed

    zero = {
        key: value for key, value in config["zero_optimization"].items() if key not in ("offload_optimizer", "zenflow")
    }
    kept = {key: config[key] for key in _KEPT if key in config}
    with without_reports_of_memory():
        engine, *_ = deepspeed.initialize(
            model=module, config=kept | {"zero_optimization": zero}, dist_init_required=False
        )
    engine.eval()
    return FrozenModel(engine.module)
