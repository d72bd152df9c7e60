"""Next-token prediction: what all tasks of causal language models share.

A task says which samples there are, what the loss of a micro batch is, how a prompt is written for the
model, and which prompts to try it with. The factories of ``register_task`` return one.
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
        """This task with the data at ``location``, which the key ``option`` names, in place of its own.

        Raises UserError where there is none, or the task cannot read other data.
        """
        raise UserError(f"{option}: the task {type(self).__name__} reads only its own data. Leave `{option}` out.")

    @abstractmethod
    def example_prompts(self, count: int) -> list[str]:
        """Prompts made from the first ``count`` rows that can be used."""

    @abstractmethod
    def prompt_text(self, prompt: str) -> str:
        """The text that the model is given for ``prompt``, written as in training."""

    special_tokens_in_text = False
    """Whether special tokens spelt in a text are encoded as such, as in a chat template's text, or as characters."""

    def chat_template(self) -> str | None:
        """A Jinja template that renders a dialogue as in training; None where the tokenizer's own does."""
        return None

    @property
    def last_token(self) -> int:
        """The token at which an answer ends."""
        end: int = self.tokenizer.eos_token_id
        return end

    @property
    def end_tokens(self) -> list[int]:
        """All tokens with which training ends an answer."""
        return [self.last_token]

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of ``prompt`` as in training; cut on the left where it is too long."""
        ids = self.without_bos(self.encode([self.prompt_text(prompt)])[0])
        return [*self.bos, *ids[-(self.context.max_seq_length // 2) :]] or [self.tokenizer.eos_token_id]

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

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens around it, which the task adds by id.

        ``</s>`` in a text, which in HTML ends a struck-out passage, is four characters and not the end of a
        sequence, unless a chat template wrote the text.
        """
        if not texts:
            return []
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # As transformers does, without each token's place in the text, which takes a fifth of the time.
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
            verbose=False,  # no warning that a text is too long for the model: it is cut
        )["input_ids"]
        return ids

    @property
    def bos(self) -> list[int]:
        """The beginning-of-sequence token; empty for tokenizers without one."""
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    def without_bos(self, ids: list[int]) -> list[int]:
        """``ids`` without beginning-of-sequence tokens that a template wrote: the task adds one, by id."""
        written = 0
        while self.bos and ids[written : written + 1] == self.bos:
            written += 1
        return ids[written:]
