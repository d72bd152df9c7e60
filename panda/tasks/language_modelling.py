"""Next-token prediction: what every task of a causal language model shares.

A task answers four questions: which samples there are, what the loss of a micro batch is, what the
model is asked with, and two things to ask it. What ``register_task`` factories return.
"""

from __future__ import annotations

import os
import re
from abc import ABC
from abc import abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING
from typing import Any

from panda.data.reading import BadRow
from panda.data.reading import Row
from panda.data.reading import data_files
from panda.data.reading import kind_of
from panda.registry import UserError
from panda.registry.contexts import TaskContext

if TYPE_CHECKING:
    import torch

    from panda.data.batches import Batch
    from panda.data.token_dataset import TokenDataset
    from panda.data.token_dataset import TokenDatasetBuilder

ROWS_AT_ONCE = 1000
"""Rows that are tokenised in one call."""

_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character outside the basic plane: JSON can escape one alone, and no encoding can write it."""


class LanguageModelling(ABC):
    """A task whose loss is the cross-entropy of the supervised tokens."""

    option: str
    """The key that says where the data is."""
    text_fields: tuple[str, ...]
    """Fields that each row has to have, as text."""

    def __init__(self, location: str, context: TaskContext) -> None:
        self.location = location
        self.context = context
        self.tokenizer = context.tokenizer
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "tokenizer: it has no end-of-sequence token, so a model could not learn where to stop. Set `eos_token`"
                " in its tokenizer_config.json."
            )
        self.files = data_files(location, context.reader.suffixes, self.option)

    @abstractmethod
    def add_samples(self, rows: list[Row], builder: TokenDatasetBuilder) -> None:
        """Tokenise ``rows``, whose fields are checked, into samples of ``builder``."""

    @abstractmethod
    def prompt_text(self, prompt: str) -> str:
        """The text that the model is given for ``prompt``, as it saw it in training."""

    @abstractmethod
    def example_prompt(self, row: Row) -> str:
        """A prompt made of a row of the data."""

    def check_row(self, row: Row) -> str | None:
        """What is wrong with ``row``, if anything."""
        missing = [name for name in self.text_fields if name not in row.fields]
        if missing:
            found = ", ".join(map(repr, row.fields)) or "none"
            return f"no field {' and no '.join(map(repr, missing))}; its fields are: {found}"
        for name in self.text_fields:
            value = row.fields[name]
            if not isinstance(value, str):
                return f"field {name!r} is {kind_of(value)}, not text"
            if half := _SURROGATE.search(value):
                return f"field {name!r} has half a surrogate pair, {half.group()!r}, which is not text"
        return None

    def dataset(self) -> TokenDataset:
        """Read and tokenise everything. Raises UserError where no row can be used."""
        from panda.data.token_dataset import TokenDatasetBuilder

        # Set, so that tokenizers neither warns nor turns parallelism off when workers are forked.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        builder = TokenDatasetBuilder()
        builder.report.files = len(self.files)
        rows = self._good_rows(builder)
        while block := list(islice(rows, ROWS_AT_ONCE)):
            self.add_samples(block, builder)
        dataset = builder.finish()
        if len(dataset) == 0:
            reasons = "".join(f"\n  {line}" for line in dataset.report.lines())
            raise UserError(f"{self.option}: {self.location!r} has no row that can be trained on.{reasons}")
        return dataset

    def example_prompts(self, count: int) -> list[str]:
        """Prompts of the first ``count`` good rows."""
        from panda.data.token_dataset import TokenDatasetBuilder

        return [self.example_prompt(row) for row in islice(self._good_rows(TokenDatasetBuilder()), count)]

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of ``prompt`` as the model saw prompts in training; cut from the left where too long."""
        ids = self.encode([self.prompt_text(prompt)])[0]
        return [*self.bos, *ids[-(self.context.max_seq_length // 2) :]] or [self.tokenizer.eos_token_id]

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Cross-entropy of the supervised tokens of ``batch``, **summed**, in float32; a scalar.

        The sum, and not a mean: the engine divides by the number of supervised tokens of the whole
        step, so that it does not matter how the step is split. A model that computes the sum itself,
        without logits, says so with ``sums_loss`` (see panda.models).
        """
        if getattr(model, "sums_loss", False):
            summed: torch.Tensor = model(
                batch.input_ids, labels=batch.labels, supervised_tokens=batch.supervised_tokens
            )
            return summed
        import torch.nn.functional as F  # noqa: N812 - the customary name

        output = model(batch.input_ids)
        logits = getattr(output, "logits", output)  # [rows, length, vocabulary]
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens: the task sets those, by id.

        ``</s>`` in a text, HTML for the end of a struck-out passage, is four characters and no end of a sequence.
        """
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    @property
    def bos(self) -> list[int]:
        """The beginning-of-sequence token, for tokenizers that have one."""
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    def _good_rows(self, builder: TokenDatasetBuilder) -> Iterator[Row]:
        for file in self.files:
            for row in self.context.reader.read(file):
                builder.report.rows += 1
                problem = row.problem if isinstance(row, BadRow) else self.check_row(row)
                if problem:
                    builder.report.add_bad(BadRow(row.file, row.number, problem))
                elif isinstance(row, Row):
                    yield row
