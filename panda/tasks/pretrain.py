"""The ``pretrain`` task: learn to continue text. Every token carries loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from panda.data.reading import Row
from panda.registry import register_task
from panda.registry.contexts import TaskContext
from panda.tasks.language_modelling import LanguageModelling

if TYPE_CHECKING:
    from panda.data.token_dataset import TokenDatasetBuilder

EXAMPLE_CHARACTERS = 40
"""Characters of a document that serve as a prompt."""


@dataclass(frozen=True)
class PretrainOptions:
    """Options of the pretrain task."""

    pretraining_data_dir: str = "./dataset/pretraining"
    """Folder, read recursively, or file of rows with "title" and "content"."""


@register_task("pretrain", options=PretrainOptions)
class Pretrain(LanguageModelling):
    """Continuation of documents: rows of "title" and "content", joined, every token with loss."""

    option = "pretraining_data_dir"
    text_fields = ("title", "content")

    def __init__(self, options: PretrainOptions, context: TaskContext) -> None:
        super().__init__(options.pretraining_data_dir, context)

    def check_row(self, row: Row) -> str | None:
        problem = super().check_row(row)
        if problem is None and not (row.fields["title"] or row.fields["content"]):
            return "fields 'title' and 'content' are empty"
        return problem

    def add_samples(self, rows: list[Row], builder: TokenDatasetBuilder) -> None:
        documents = self.encode([self._text(row) for row in rows])
        for document in documents:
            tokens = [*self.bos, *document, self.tokenizer.eos_token_id]
            # A window begins with the last token of the one before, so that every token but the
            # document's first is predicted exactly once.
            stride = self.context.max_seq_length - 1
            for start in range(0, len(tokens) - 1, stride):
                builder.add(tokens[start : start + stride + 1], unsupervised=1)

    def prompt_text(self, prompt: str) -> str:
        return prompt

    def example_prompt(self, row: Row) -> str:
        return self._text(row)[:EXAMPLE_CHARACTERS]

    def _text(self, row: Row) -> str:
        return f"{row.fields['title']}\n{row.fields['content']}"
