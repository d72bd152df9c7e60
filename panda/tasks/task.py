"""What is learned: samples of named arrays, how they become batches, and the loss of a batch.

The factories of ``register_task`` return a ``Task``. A loss is a **sum** over *units* (supervised tokens, pairs,
sequences: the batch says how many it has), and the engine divides by the units of the whole optimizer step, over all
micro batches and ranks. So it does not matter how a step is split.
"""

from __future__ import annotations

from abc import ABC
from abc import abstractmethod
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple
from typing import Protocol

from panda.data.conversations import UnusableRowError
from panda.data.encoding import Encoder
from panda.registry import UserError
from panda.registry.contexts import Better as Better
from panda.registry.contexts import Loss as Loss
from panda.registry.contexts import Reference as Reference
from panda.registry.contexts import TaskContext

if TYPE_CHECKING:
    import torch

    from panda.data.batches import Batch
    from panda.data.batches import RowShape
    from panda.data.locations import Locations
    from panda.data.token_dataset import Sample
    from panda.data.token_dataset import SampleSet
    from panda.run.state import Run

Statistics = Mapping[str, "torch.Tensor"]
"""Sums over a whole optimizer step, by name; over the whole held-out data in an evaluation."""
NO_STATISTICS: Statistics = {}


class Generated(NamedTuple):
    """What a model made of some prompts."""

    token_ids: list[list[int]]
    """Of each prompt, the tokens that follow it, with the one that ends them if it came."""
    log_probs: list[list[float]]
    """Of each of these tokens, under the temperature and before ``top_p`` and ``top_k``."""
    ended: list[bool]
    """Whether the token that ends an answer came."""


class Generate(Protocol):
    """Continues prompts with the model as it is, in evaluation mode and without gradients.

    Every rank has to call it equally often, some perhaps without prompts: under ZeRO-3 and tensor parallelism they run
    the model together.
    """

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        keys: Sequence[tuple[int, ...]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        end_tokens: Sequence[int] | None = None,
        processors: Any = None,
        criteria: Sequence[Any] = (),
    ) -> Generated:
        """``keys``: of each prompt, whole numbers, such as (step, index of the sample, number of the answer). The
        random numbers of an answer follow from the run's seed and its key, and from nothing else. ``temperature`` 0
        takes the likeliest token. ``end_tokens``: by default those of the task. ``processors`` and ``criteria``: what
        else inference does to scores, and where it stops, as ``run.decoding`` has them; by default nothing."""
        ...


@dataclass(frozen=True)
class ShownPart:
    """A sequence of tokens of a sample, for ``panda data``."""

    name: str
    token_ids: list[int]
    supervised: list[bool]


class Task(ABC):
    """A task: samples, batches, and the loss of a batch."""

    unit = "samples"
    """What the loss is a mean of, in the plural; the key in records that counts them."""
    layouts: tuple[str, ...] = ("padded", "grouped")
    """The values of ``batching`` with which the loss is right. A class with a ``loss`` or a ``collate`` of its own has
    these, whatever the class that it is derived from states, unless it states its own."""
    metrics: Mapping[str, Better] | None = None
    """The metrics that ``loss`` returns, all of them, each with which value is the better one: "higher", "lower", or
    None for neither. A name in `best_metric` and the like is then checked before the data is read. None where the task
    does not state them: such a name is known to be wrong only at the first evaluation. A class with a ``loss`` of its
    own states none, whatever the class that it is derived from states, unless it states its own."""
    shown: tuple[str, ...] = ()
    """The metrics that the line of progress shows."""

    def __init__(self, context: TaskContext) -> None:
        self.context = context
        self.tokenizer = context.tokenizer
        """As it is exported: its chat template, if it has one, writes a dialogue as in training."""
        self.encoder = Encoder(self.tokenizer)
        self.reference: Any = None
        """From ``start`` on, the frozen model of ``reference_of``, called like the model: without gradients, in
        evaluation mode."""
        self.generate: Generate | None = None
        """From ``start`` on: for ``rollout``."""

    # -- what the options ask for, before anything is built

    @classmethod
    def reference_of(cls, options: Any) -> Reference | None:
        """The frozen model that the loss needs besides the one that is trained; None for none."""
        return None

    @classmethod
    def largest_sample(cls, options: Any, max_seq_length: int) -> tuple[int, int]:
        """The rows that the model is given at once for the largest sample, and the tokens of each; for estimates."""
        return 1, max_seq_length

    # -- samples

    @abstractmethod
    def dataset(self) -> SampleSet:
        """The samples. Raises UserError where no row can be used."""

    def reading(self, locations: Locations, option: str) -> Task:
        """This task with the data at ``locations``, which the key ``option`` names, in place of its own.

        Raises UserError where there is none, or the task cannot read other data.
        """
        raise UserError(f"{option}: the task {type(self).__name__} reads only its own data. Leave `{option}` out.")

    @abstractmethod
    def collate(self, rows: list[list[Sample]], shape: RowShape) -> Batch:
        """The batch of ``rows``, at least one, of one sample each, or of several where they are packed.

        A sample also has its number in the data set, ``index``. Called in processes of their own, so it has no model,
        and it draws no random numbers: a batch depends on its samples only.
        """

    def parts(self, sample: Sample) -> list[ShownPart]:
        """The sequences of tokens in ``sample``, to be shown."""
        return []

    def question(self, sample: Sample) -> tuple[list[int], list[int]] | None:
        """The prompt and the answer of ``sample``, as token ids, to compare an answer of the model with it.

        The answer has the token that ends it. None where the sample has no answer, as a text has none.
        """
        return None

    # -- the loss

    @abstractmethod
    def loss(self, model: Any, batch: Batch, statistics: Statistics = NO_STATISTICS) -> Loss | torch.Tensor:
        """The loss of ``batch`` under ``model``, **summed** over its units, and metrics; a tensor alone has none.

        ``statistics`` is given only where the task overrides that method. Under ZeRO-3 ranks run the model together:
        how often it is called must not depend on the batch.
        """

    def statistics(self, model: Any, batch: Batch) -> Statistics:
        """What ``batch`` adds to the sums that ``loss`` needs of the whole step, before its first backward pass.

        A task that has some overrides it. It is then called with each micro batch of a step, without gradients, and
        draws the random numbers (for dropout) that the loss will draw again; ``loss`` is given the sums over all
        micro batches and ranks.
        """
        return NO_STATISTICS

    # -- the run

    def extend(self, model: torch.nn.Module) -> Mapping[str, torch.nn.Module]:
        """New parts of ``model`` beside its checkpoint, by the names that they get as its attributes.

        ``model`` has no weights yet; its ``config`` can be changed, for the export. The parts are drawn from the run's
        seed, trained, also with adapters, and saved and exported with the model. ``part`` gives them back.
        """
        return {}

    def part(self, model: Any, name: str) -> Any:
        """The part ``name`` of ``extend``, of the model that ``loss`` is given."""
        module = getattr(model, "module", model)
        base = getattr(module, "get_base_model", None)  # under adapters
        return getattr(base() if base else module, name)

    def start(self, run: Run) -> None:
        """Called once, when all is built and loaded and before the next step."""
        self.reference, self.generate = run.reference, run.generate

    def rollout(self, batches: list[Batch], step: int, *, training: bool) -> list[Batch]:
        """The batches to train on in optimizer step ``step``, from those of this rank's samples of the step.

        A task that makes its samples while it trains overrides it, and generates answers with ``generate``. All ranks
        must return equally many; a rank of which all batches are ``idle`` returns idle ones. They may depend on the
        weights, the seed, ``step`` and the samples only: so a resumed run makes the same ones. Called for an
        evaluation too, with the step after which it is, and not ``training``.
        """
        return batches

    # -- text

    def example_prompts(self, count: int) -> list[str]:
        """Prompts for answers at the end of a run, made from the first ``count`` rows that can be used."""
        return []

    def text_format(self) -> str:
        """How text is written for the model, for the first lines of a run."""
        return "text as it is"

    @property
    def pad_token_id(self) -> int:
        """The token that fills rows up. No model sees it."""
        return self.tokenizer.pad_token_id or 0

    @property
    def end_tokens(self) -> list[int]:
        """The tokens at which an answer ends, of which training teaches at least one."""
        return [self.tokenizer.eos_token_id]

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of ``prompt`` as in training. Raises UserError where it cannot be written so."""
        try:
            return self.prompt_ids(prompt) or [self.tokenizer.eos_token_id]
        except UnusableRowError as problem:
            raise UserError(f"prompt {prompt[:40]!r}: {problem}") from None

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of ``prompt`` as in training, perhaps none. Raises UnusableRowError where that cannot be."""
        return self.encoder.encode_content(prompt)


def stated_metrics(task: Task) -> dict[str, Better] | None:
    """The metrics that ``task`` states for its ``loss``; None where it does not.

    Raises UserError where that is no mapping of names, or lacks one that is shown.
    """
    for cls in type(task).__mro__:
        if "metrics" in vars(cls):
            break
        if "loss" in vars(cls):
            return None
    stated = task.metrics
    if stated is None:
        return None
    whose = f"task: {type(task).__name__}"
    found = checked_metrics(stated, f"{whose}: its `metrics`")
    if lacking := [name for name in task.shown if name not in stated]:
        raise UserError(f"{whose}: `shown` names {lacking[0]!r}, which is none of its `metrics`: {', '.join(stated)}.")
    return found


def checked_metrics(stated: Any, what: str) -> dict[str, Better]:
    """``stated`` if it is a mapping of names to which value is the better one; else raises UserError about ``what``."""
    better = ("higher", "lower", None)
    if not isinstance(stated, Mapping) or any(not isinstance(name, str) for name in stated):
        raise UserError(f"{what} are {stated!r:.80}. Write names, each with one of {better}.")
    if wrong := [name for name, value in stated.items() if value not in better]:
        raise UserError(f"{what}: {wrong[0]!r} is {stated[wrong[0]]!r:.40}. Write one of {better}.")
    return dict(stated)


def refuse_without_end(tokenizer: Any) -> None:
    """Raise UserError where ``tokenizer`` has no token that ends a text."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            "tokenizer: it has no end-of-sequence token, so a model could not learn where to stop. Set `eos_token`"
            " in its tokenizer_config.json."
        )
