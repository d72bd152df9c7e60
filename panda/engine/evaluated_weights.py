"""Optimizers that train with other weights than those that are evaluated, exported and saved.

Such an optimizer has methods ``eval_weights`` and ``train_weights``, which turn the tensors that it steps into the one
and into the other, in place. Here the weights of the forward pass follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from typing import Any

from panda.engine.parameter_layouts import read_layout
from panda.engine.weights_copy import set_weights

if TYPE_CHECKING:
    from panda.engine.engine import Engine


def evaluates_others(engine: Engine) -> bool:
    """Whether the optimizer of ``engine`` evaluates other weights than it trains with."""
    return hasattr(engine.own_optimizer, "eval_weights")


@contextmanager
def evaluated_weights(engine: Engine) -> Iterator[None]:
    """In the meantime the model and the optimizer's tensors are the weights to evaluate; then those to train again.

    Every rank has to open it. Nothing may be trained in it.
    """
    optimizer: Any = engine.own_optimizer
    if not evaluates_others(engine):
        yield
        return
    optimizer.eval_weights()
    _follow(engine)
    try:
        yield
    finally:
        train_again(engine)


def train_again(engine: Engine) -> None:
    """Give the model the weights to train with. Checkpoints hold those to evaluate, and the others as a state."""
    optimizer: Any = engine.own_optimizer
    if hasattr(optimizer, "train_weights"):
        optimizer.train_weights()
        _follow(engine)


def _follow(engine: Engine) -> None:
    """Set the model's weights from the tensors that the optimizer steps, unless they are the same."""
    if engine.optimizer is not engine.own_optimizer:
        set_weights(engine, read_layout(engine.module, engine.optimizer)[1])
