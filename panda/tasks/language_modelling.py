"""Next-token prediction: what all tasks of causal language models share.

A task says which samples there are, what the loss of a micro batch is, which tokens a prompt becomes, and
which prompts to try the model with. The factories of ``register_task`` return one.
"""

from __future__ import annotations

from abc import ABC
from abc import abstractmethod
from typing import TYPE_CHECKING
from typing import Any

from panda.data.conversations import UnusableRowError
from panda.data.encoding import Encoder
from panda.registry import UserError
from panda.registry.contexts import IGNORED_LABEL
from panda.registry.contexts import TaskContext

if TYPE_CHECKING:
    import torch

    from panda.data.batches import Batch
    from panda.data.locations import Locations
    from panda.data.token_dataset import SampleSet


class LanguageModelling(ABC):
    """A task whose loss is the cross-entropy of the supervised tokens."""

    def __init__(self, context: TaskContext) -> None:
        self.context = context
        self.tokenizer = context.tokenizer
        """As it is exported: its chat template, if it has one, writes a dialogue as in training."""
        self.encoder = Encoder(self.tokenizer)
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "tokenizer: it has no end-of-sequence token, so a model could not learn where to stop. Set `eos_token`"
                " in its tokenizer_config.json."
            )

    @abstractmethod
    def dataset(self) -> SampleSet:
        """The samples, tokenised. Raises UserError where no row can be used."""

    def reading(self, locations: Locations, option: str) -> LanguageModelling:
        """This task with the data at ``locations``, which the key ``option`` names, in place of its own.

        Raises UserError where there is none, or the task cannot read other data.
        """
        raise UserError(f"{option}: the task {type(self).__name__} reads only its own data. Leave `{option}` out.")

    @abstractmethod
    def example_prompts(self, count: int) -> list[str]:
        """Prompts made from the first ``count`` rows that can be used."""

    def text_format(self) -> str:
        """How text is written for the model, for the first lines of a run."""
        return "text as it is"

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

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Cross-entropy of the supervised tokens of ``batch``, **summed**, in float32; a scalar.

        A sum, not a mean: the engine divides by the number of supervised tokens of the whole step, so that
        it does not matter how the step is split. A model that computes the sum itself, without logits,
        says so with ``sums_loss`` (see panda.models).
        """
        if getattr(model, "sums_loss", False):
            counted = {"labels": batch.labels, "supervised_tokens": batch.supervised_tokens}
            summed: torch.Tensor = model(batch.input_ids, **batch.positions, **counted)
            return summed
        import torch.nn.functional as F  # noqa: N812 - the customary name

        output = model(batch.input_ids, **batch.positions)
        logits = getattr(output, "logits", output)  # [rows, length, vocabulary]
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            batch.labels[:, 1:].flatten(),
            ignore_index=IGNORED_LABEL,
            reduction="sum",
        )
