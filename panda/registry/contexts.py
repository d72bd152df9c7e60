"""The second argument of a factory, after its options: one class for each kind.

Fields may be added to these classes: a factory should take those that it needs, by name.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import TYPE_CHECKING
from typing import Any
from typing import Literal
from typing import NamedTuple
from typing import Protocol
from typing import TypeAlias

if TYPE_CHECKING:
    import torch

    from panda.data import Reader
    from panda.data.token_cache import TokenCache
    from panda.registry.chosen import Chosen


MAX_ROW_BYTES = 16 << 20
"""The default of ``max_row_bytes``: the longest novels are half of it, and tokenising as much takes about 2 GB."""


@dataclass(frozen=True)
class ReaderContext:
    """For a reader. What is in it decides which rows there are: it is part of the token cache's address."""

    max_row_bytes: int = MAX_ROW_BYTES
    """A larger row, in the bytes of its file, unpacked, is a bad row; a reader does not hold it in memory."""


@dataclass(frozen=True)
class TaskContext:
    """For a task."""

    tokenizer: Any
    """A transformers tokenizer."""
    reader: Reader
    max_seq_length: int
    """Tokens that a sample may have at most."""
    reader_options: Any = None
    """The reader's options: they are part of the token cache's address."""
    token_cache: TokenCache | None = None
    """Keeps tokenised data: ``token_cache.samples(recipe)``; without one it is tokenised in memory."""
    held_out: Sequence[str] | None = None
    """Paths and patterns of the data to evaluate on, which a task does not train on."""
    reader_context: ReaderContext = ReaderContext()
    """What the reader was given beside its options: part of that address, too."""
    named: Sequence[Chosen] = ()
    """The components that options marked with ``Names`` name: a task builds those of the kind that its package adds,
    with ``build(context, expected)``, where ``expected`` is the type of what the factory has to return."""


IGNORED_LABEL = -100
"""In the ``labels`` that a model is given: a token that carries no loss. The value that torch ignores by default."""


@dataclass(frozen=True)
class ModelContext:
    """For a model."""

    vocab_size: int
    """The rows that the tokenizer needs, its highest id and one more: the model needs at least as many."""
    max_seq_length: int
    """Tokens that a row of a batch has at most."""
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | None
    config: Mapping[str, Any] | None = None
    """The config.json of the checkpoint that the model's weights will come from; None for random ones.

    The embedding needs as many rows as its ``vocab_size``. The module is then made without weights, on
    the meta device: a factory must not read them.
    """
    new_rows_from: int | None = None
    """The first row for which the checkpoint has no token, if the run adds tokens (`extend_vocab`)."""


Better: TypeAlias = Literal["higher", "lower"] | None
"""Which value of a number is the better one; None where neither is, as of a count."""


class Loss(NamedTuple):
    """What a task returns for a batch."""

    sum: torch.Tensor
    """A scalar: the loss, summed over the units of the batch."""
    metrics: Mapping[str, tuple[Any, Any]] = {}
    """By name a numerator and a denominator, scalars on the device or numbers: each is added up over the micro batches
    of all ranks before they are divided. Every batch has the same names."""


@dataclass(frozen=True)
class Reference:
    """The frozen model that a task compares the trained one with."""

    checkpoint: str | None = None
    """Where it is, as ``ckpt_path`` would say it: another model with the same tokenizer, such as a teacher. None for
    the weights from which the run starts; under adapters that is the base, with the adapters off."""


class StepLoss(Protocol):
    """A loss over a whole optimizer step that a model adds to its task's: the attribute ``step_loss`` of a module.

    Its gradient needs statistics of all micro batches on all ranks. The engine has them counted before the first
    backward pass.
    """

    weight: float
    """The factor with which it is added to the task's loss per unit."""

    def count(self, real: torch.Tensor, forward: Callable[[], Any]) -> torch.Tensor:
        """What ``forward``, a pass of the model over a micro batch, adds to the statistics: a tensor to sum.

        ``real`` [rows, length]: which tokens are not padding.
        """
        ...

    def term(
        self,
        real: torch.Tensor,
        statistics: torch.Tensor | None,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
        forward: Callable[[], Any],
    ) -> tuple[Any, torch.Tensor]:
        """The result of ``forward``, and its part of the loss: parts are summed over micro batches and ranks.

        ``statistics``: those of the step. None for a step of one micro batch to a rank: they are then counted in this
        pass, and summed by ``sum_over_ranks``, a collective.
        """
        ...


@dataclass(frozen=True)
class TensorParallelPlan:
    """How a model is split over tensor-parallel ranks: the attribute ``tensor_parallel_plan`` of a module.

    Layers are patterns of names of modules (``*`` is any text).
    """

    column: tuple[str, ...]
    """Linear layers of which each rank computes a part of the outputs; what follows works on such parts."""
    row: tuple[str, ...]
    """Linear layers that are given a part of their inputs on each rank; outputs are summed, and whole."""
    vocabulary: tuple[str, ...]
    """Embeddings, and the linear output head: each rank has some of the vocabulary's rows; outputs are whole."""
    sizes: Mapping[str, int]
    """Sizes that the number of ranks has to divide, by the names of the model's options: heads, widths, vocabulary."""
    blocks: tuple[str, ...] = ()
    """Modules whose inputs go only to their column layers: the gradients of these inputs are summed over ranks once for
    all of the layers, and not for each."""


ParameterKind = Literal["matrix", "expert", "adapter", "embedding", "head", "norm", "bias", "vector", "tensor"]
"""``matrix``: any with two dimensions that is none of the following. ``expert``: of a mixture, a matrix or, with three
dimensions, those of all experts. ``adapter``: a low-rank matrix. ``embedding``: a table, the rows of new tokens that
are trained beside adapters, or the low-rank table of an adapted embedding. ``head``: what makes logits, or such rows of
it, unless it is also the embedding. ``vector``: one dimension, or only one that is not 1. ``tensor``: more than two
dimensions."""


@dataclass(frozen=True)
class ParameterDescription:
    """A parameter as the model has it, of which a rank may hold a part."""

    name: str
    shape: tuple[int, ...]
    """The whole shape."""
    kind: ParameterKind
    split: int | None = None
    """The dimension along which tensor-parallel ranks split it, evenly; None where each of them has all of it."""


@dataclass(frozen=True)
class OptimizerContext:
    """For an optimizer."""

    param_groups: list[dict[str, Any]]
    """``params``, ``lr`` (the peak: the schedule scales it before each step) and ``weight_decay``.

    DeepSpeed may replace them by flat fp32 tensors, each a rank's part of many parameters, before the
    first step. So create state lazily, in ``step``, in the shape of the tensors that are there. An optimizer
    that needs to know where a parameter begins has a method ``bind(layout: ParameterLayout)``, which is called
    once, before the first step. One that reports quantities of each parameter has a method
    ``observe() -> dict[str, tuple[list[str], torch.Tensor]]``: by name of a quantity, the names of
    parameters and their values. It is called where a record is logged, on rank 0 only: no collectives.
    """
    device: torch.device
    """Where the step runs."""
    bit_training: bool = False
    """Whether 8-bit state is asked for. Only ``adamw`` has a choice; others that are not 8-bit are refused."""
    described: Mapping[torch.Tensor, ParameterDescription] = field(default_factory=dict)
    """The parameters of ``param_groups``."""
    learning_rate: float = 1e-3
    """The peak, before the factors of `lr_multipliers` that ``param_groups`` have."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a tensor that holds elements of one parameter."""

    parameter: int
    """Which one: an index into ``TensorLayout.parameters``."""
    start: int
    """First element of the stretch, in the tensor."""
    length: int
    source: int
    """First element of the stretch, in the flattened parameter."""


@dataclass(frozen=True, eq=False)
class TensorLayout:
    """The contents of one tensor that an optimizer updates: a whole parameter, or this rank's part of several.

    Elements in no segment are padding, with any content.
    """

    tensor: torch.Tensor
    parameters: tuple[str, ...]
    """Names of the parameters that the ranks' tensors hold between them, in the same order on all ranks."""
    segments: tuple[Segment, ...]
    """Of this rank; none overlap."""


@dataclass(frozen=True)
class ParameterLayout:
    """Where the parameters lie in all tensors that an optimizer updates."""

    tensors: tuple[TensorLayout, ...]
    sum_over_shards: Callable[[torch.Tensor], torch.Tensor]
    """Sums a tensor over the ranks that hold parts of the same parameters, in place, and returns it. A collective.

    Meant for ratios of such sums: a parameter that every tensor-parallel rank holds whole, such as a norm's, is
    counted once by each of them.
    """
    described: Mapping[str, ParameterDescription] = field(default_factory=dict)
    """Each parameter by its name."""
    exchange: Exchange | None = None
    """What ``gather`` and ``scatter`` call; None where a test that needs neither makes a layout."""

    def gather(
        self, tensors: Sequence[TensorLayout], values: Sequence[torch.Tensor], names: Collection[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """The whole parameters that this rank owns, by name and in their shapes, on the device of the run.

        ``values``: for each of ``tensors`` a tensor with a number for each of its elements, such as its gradient; all
        of one type. ``names`` leaves out other parameters. Each parameter is whole on one rank, its owner, so that each
        is worked on once. Owners are chosen so that ranks have about the same work in a call, and are the same in each
        call with the same tensors and names. A collective: every rank has to call it with the same of both.
        """
        assert self.exchange is not None
        return self.exchange.gather(tensors, values, names)

    def scatter(
        self,
        tensors: Sequence[TensorLayout],
        wholes: Mapping[str, torch.Tensor],
        names: Collection[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[torch.Tensor]:
        """For each of ``tensors`` a tensor of its shape and on its device, with what this rank holds of ``wholes``.

        ``wholes``: what this rank made of all that ``gather`` gave it for the same tensors and names, in the same
        shapes. It is sent, and returned, as ``dtype``, by default fp32. Elsewhere there are zeros. A collective, too.
        """
        assert self.exchange is not None
        return self.exchange.scatter(tensors, wholes, names, dtype)


class Exchange(Protocol):
    """How parts of parameters become whole, and whole ones parts: as ``ParameterLayout`` says."""

    def gather(
        self, tensors: Sequence[TensorLayout], values: Sequence[torch.Tensor], names: Collection[str] | None
    ) -> dict[str, torch.Tensor]: ...

    def scatter(
        self,
        tensors: Sequence[TensorLayout],
        wholes: Mapping[str, torch.Tensor],
        names: Collection[str] | None,
        dtype: torch.dtype | None,
    ) -> list[torch.Tensor]: ...


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
