"""Next-token prediction: what every task of a causal language model shares.

A task answers four questions: which samples there are, what the loss of a micro batch is, what the
model is asked with, and two things to ask it. What ``register_task`` factories return.
"""

from __future__ import annotations

from abc import ABC
from abc import abstractmethod
from typing import TYPE_CHECKING
from typing import Any

from panda.registry import UserError
from panda.registry.contexts import IGNORED_LABEL
from panda.registry.contexts import TaskContext

if TYPE_CHECKING:
    import torch

    from panda.data.batches import Batch
    from panda.data.token_dataset import SampleSet


class LanguageModelling(ABC):
    """A task whose loss is the cross-entropy of the supervised tokens."""

    def __init__(self, context: TaskContext) -> None:
        self.context = context
        self.tokenizer = context.tokenizer
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "tokenizer: it has no end-of-sequence token, so a model could not learn where to stop. Set `eos_token`"
                " in its tokenizer_config.json."
            )

    @abstractmethod
    def dataset(self) -> SampleSet:
        """The samples, tokenised. Raises UserError where no row can be used."""

    def reading(self, location: str, option: str) -> LanguageModelling:
        """This task over the data at ``location``, which the key ``option`` names, in place of its own.

        Raises UserError where there is none, or the task cannot read other data.
        """
        raise UserError(f"{option}: the task {type(self).__name__} reads no data but its own. Leave `{option}` out.")

    @abstractmethod
    def example_prompts(self, count: int) -> list[str]:
        """Prompts made of the first ``count`` good rows."""

    @abstractmethod
    def prompt_text(self, prompt: str) -> str:
        """The text that the model is given for ``prompt``, as it saw it in training."""

    special_tokens_in_text = False
    """Whether special tokens that a text spells are tokens, as in a chat template's text, or characters."""

    def chat_template(self) -> str | None:
        """A Jinja template that renders a dialogue as training showed it; None where the tokenizer's own is kept."""
        return None

    @property
    def last_token(self) -> int:
        """The token at which an answer ends."""
        end: int = self.tokenizer.eos_token_id
        return end

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of ``prompt`` as the model saw prompts in training; cut from the left where too long."""
        ids = self.without_bos(self.encode([self.prompt_text(prompt)])[0])
        return [*self.bos, *ids[-(self.context.max_seq_length // 2) :]] or [self.tokenizer.eos_token_id]

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Cross-entropy of the supervised tokens of ``batch``, **summed**, in float32; a scalar.

        The sum, and not a mean: the engine divides by the number of supervised tokens of the whole
        step, so that it does not matter how the step is split. A model that computes the sum itself,
        without logits, says so with ``sums_loss`` (see panda.models).
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

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens around it: the task sets those, by id.

        ``</s>`` in a text, HTML for the end of a struck-out passage, is four characters and no end of a
        sequence, unless the text was written by a chat template.
        """
        if not texts:
            return []
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # What transformers would do, but for each token's place in the text: that costs a fifth of the time.
            backend.no_padding()
            backend.no_truncation()
            backend.encode_special_tokens = not self.special_tokens_in_text
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        ids: list[list[int]] = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=not self.special_tokens_in_text,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # that a text is longer than the model is for: it is cut
        )["input_ids"]
        return ids

    @property
    def bos(self) -> list[int]:
        """The beginning-of-sequence token, for tokenizers that have one."""
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    def without_bos(self, ids: list[int]) -> list[int]:
        """``ids`` without the beginning-of-sequence tokens that a template has written: there is one, by id."""
        written = 0
        while self.bos and ids[written : written + 1] == self.bos:
            written += 1
        return ids[written:]
