"""What a factory is told beside its options: the second argument, one class a kind.

A field may be added to these; a factory that takes what it needs from the context keeps working.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
    from pathlib import Path

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
    reader_options: Any = None
    """The reader's options: the token cache is addressed by them, too."""
    token_cache: Path | None = None
    """Folder in which tokenised data is kept; without one it is tokenised in memory."""


IGNORED_LABEL = -100
"""In the ``labels`` that a model is given: a token that carries no loss. The value that torch ignores by default."""


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
class TensorParallelPlan:
    """How a model is split over tensor-parallel ranks: what a module that can be has as ``tensor_parallel_plan``.

    Layers are patterns of names of modules (``*`` is any text).
    """

    column: tuple[str, ...]
    """Linear layers of which each rank computes a part of the outputs; what stands behind works on such parts."""
    row: tuple[str, ...]
    """Linear layers that are given a part of their inputs on each rank; outputs are summed, and whole."""
    vocabulary: tuple[str, ...]
    """Embeddings, and the linear output head: each rank has a part of the vocabulary's rows; outputs are whole."""
    sizes: Mapping[str, int]
    """What the number of ranks has to divide, as the model's options call it: heads, widths inside, vocabulary."""


@dataclass(frozen=True)
class OptimizerContext:
    """For an optimizer."""

    param_groups: list[dict[str, Any]]
    """``params``, ``lr`` (the peak: the schedule scales it before each step) and ``weight_decay``.

    DeepSpeed may put flat fp32 tensors, each a rank's part of many parameters, in their place before
    the first step. So make state lazily, in ``step``, of the shape of what is there. An optimizer to
    which it matters where a parameter begins has a method ``bind(layout: ParameterLayout)``: it is called once,
    before the first step, with what lies where. One that has something to tell of each parameter has a
    method ``observe() -> dict[str, tuple[list[str], torch.Tensor]]``: by name of a quantity, the names of
    parameters and their values. It is called where a record is logged, on rank 0 alone: no collectives.
    """
    device: torch.device
    """Where the step runs."""
    bit_training: bool = False
    """Whether 8-bit state is asked for: refused to all but ``adamw`` and those that have nothing else."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a tensor that one parameter's elements fill."""

    parameter: int
    """Which one: an index into ``TensorLayout.parameters``."""
    start: int
    """First element of the stretch, in the tensor."""
    length: int
    source: int
    """First element of the stretch, in the flattened parameter."""


@dataclass(frozen=True, eq=False)
class TensorLayout:
    """What lies where in one tensor that an optimizer steps: a whole parameter, or this rank's part of some.

    What no segment covers is padding of any content.
    """

    tensor: torch.Tensor
    parameters: tuple[str, ...]
    """Names of the parameters that the ranks' tensors hold together: the same, in one order, on all ranks."""
    segments: tuple[Segment, ...]
    """Of this rank; none overlap."""


@dataclass(frozen=True)
class ParameterLayout:
    """Where the parameters lie in all tensors that an optimizer steps."""

    tensors: tuple[TensorLayout, ...]
    sum_over_shards: Callable[[torch.Tensor], torch.Tensor]
    """Sums a tensor over the ranks that hold parts of the same parameters, in place, and returns it. A collective.

    For ratios of such sums: what tensor-parallel ranks hold whole, norms and the like, is counted by each of them.
    """


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
