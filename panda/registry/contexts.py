"""What a factory is told beside its options: the second argument, one class a kind.

A field may be added to these; a factory that takes what it needs from the context keeps working.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
    import torch

    from panda.data import Reader


@dataclass(frozen=True)
class ReaderContext:
    """For a reader: nothing yet."""


@dataclass(frozen=True)
class TaskContext:
    """For a task."""

    tokenizer: Any
    """A transformers tokenizer."""
    reader: Reader
    max_seq_length: int
    """Tokens that a sample may have at most."""


@dataclass(frozen=True)
class ModelContext:
    """For a model."""

    vocab_size: int
    """Entries of the tokenizer: the model needs at least as many."""
    max_seq_length: int
    """Tokens that a row of a batch has at most."""
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | None
    config: Mapping[str, Any] | None = None
    """The config.json of the checkpoint that the model's weights will come from; None for random ones.

    Its ``vocab_size`` is what the embedding has to have. The module is made without weights then, on
    the meta device: a factory must not read them.
    """


@dataclass(frozen=True)
class OptimizerContext:
    """For an optimizer."""

    param_groups: list[dict[str, Any]]
    """``params``, ``lr`` (the peak: the schedule scales it before each step) and ``weight_decay``.

    DeepSpeed may put flat fp32 tensors, each a rank's part of many parameters, in their place before
    the first step. So make state lazily, in ``step``, of the shape of what is there.
    """
    device: torch.device
    """Where the step runs."""


@dataclass(frozen=True)
class LRSchedulerContext:
    """For a learning-rate schedule. Everything is counted in optimizer steps."""

    total_steps: int
    """Optimizer steps of the whole run, at least 1."""
    learning_rate: float
    """The peak, for a schedule that ends at an absolute rate."""


@dataclass(frozen=True)
class PluginContext:
    """For a lifecycle plugin: nothing yet; its hooks are given the run."""
