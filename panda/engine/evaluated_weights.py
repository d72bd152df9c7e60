"""Optimizers that train with other weights than those that are evaluated, exported and saved.

Such an optimizer has methods ``eval_weights`` and ``train_weights``, which turn the tensors that it steps into the one
and into the other, in place. Here the weights of the forward pass follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from typing import Any

import torch

from panda.engine.parameter_layouts import read_layout

if TYPE_CHECKING:
    from panda.engine.engine import Engine


@contextmanager
def evaluated_weights(engine: Engine) -> Iterator[None]:
    """In the meantime the model, and the optimizer's tensors, have the weights to evaluate; then those to train.

    Every rank has to open it. Nothing may be trained in it. It may be opened within itself.
    """
    optimizer: Any = engine.own_optimizer
    if not hasattr(optimizer, "eval_weights") or engine.has_evaluated_weights:
        yield
        return
    optimizer.eval_weights()
    _follow(engine)
    engine.has_evaluated_weights = True
    try:
        yield
    finally:
        engine.has_evaluated_weights = False
        train_again(engine)


def train_again(engine: Engine) -> None:
    """Give the model the weights to train with. Checkpoints hold those to evaluate, and the others as a state."""
    optimizer: Any = engine.own_optimizer
    if hasattr(optimizer, "train_weights"):
        optimizer.train_weights()
        _follow(engine)


@torch.no_grad()
def _follow(engine: Engine) -> None:
    """Set the model's weights from the tensors that the optimizer steps, as DeepSpeed does after a step."""
    wrapper: Any = engine.optimizer
    if wrapper is engine.own_optimizer:  # the tensors are the weights
        return
    if hasattr(wrapper, "update_lp_params"):  # ZeRO-1 and 2, and BF16_Optimizer
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp32_partitioned_groups_flat"):  # ZeRO-3
        engine.take_partitions_from(read_layout(engine.module, wrapper)[1])
    else:  # 16 bits without ZeRO
        for weights, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
