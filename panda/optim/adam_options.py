"""The options that all variants of Adam share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from panda.registry import Meta


@dataclass(frozen=True)
class AdamOptions:
    """Options of Adam."""

    adam_betas: tuple[Annotated[float, Meta(ge=0, lt=1)], Annotated[float, Meta(ge=0, lt=1)]] = (0.9, 0.99)
    """Decay rates of the moving averages of gradients and of squared gradients."""
    adam_epsilon: Annotated[float, Meta(gt=0)] = 1e-6
    """Added to the square root of the second moment."""
