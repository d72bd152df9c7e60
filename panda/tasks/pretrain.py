"""The ``pretrain`` task: learn to continue text. Every token carries loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

from panda.data.conversations import UnusableRowError
from panda.data.conversations import conversation_of
from panda.data.conversations import missing
from panda.data.conversations import refuse_weight
from panda.data.conversations import text_of
from panda.data.reading import Row
from panda.data.templates import with_template
from panda.data.tokenised import Tokenised
from panda.data.tokenised import tokenised_of
from panda.registry import Location
from panda.registry import Meta
from panda.registry import register_task
from panda.registry.contexts import TaskContext
from panda.tasks.language_modelling import NextTokenOptions
from panda.tasks.row_task import check_weights
from panda.tasks.text_task import TextTask

if TYPE_CHECKING:
    from panda.data.token_dataset import SampleBlock

EXAMPLE_CHARACTERS = 40
"""Characters of a document that make an example prompt."""
CONTENT_FIELDS = ("content", "text")


@dataclass(frozen=True)
class PretrainFormat:
    """How rows become documents."""

    title_field: str = "title"
    """Field of a document's title, which is written on a line before its content. A row may lack it."""
    content_field: str | None = None
    """Field of a document's content; by default "content" or "text"."""


@dataclass(frozen=True)
class PretrainOptions(PretrainFormat, NextTokenOptions):
    """Options of the pretrain task."""

    pretraining_data_dir: tuple[Annotated[str, Location(holds_data=True)], ...] = ("./dataset/pretraining",)
    """Folder, read recursively, file, pattern of files, or data set on the hub (`OWNER/NAME:CONFIGURATION:SPLIT`), or a
    list of these; rows have "content" or "text", and perhaps "title"."""
    data_weights: tuple[Annotated[float, Meta(gt=0)], ...] = ()
    """Passes over the data of each path in an epoch, `1, 0.5`; by default one over all. 2 shows each sample twice, 0.1
    another tenth of them each epoch."""

    def __post_init__(self) -> None:
        check_weights("data_weights", self.data_weights, self.pretraining_data_dir)


@register_task("pretrain", options=PretrainOptions)
class Pretrain(TextTask):
    """Continuation of documents: rows of "title" and "content", or of "text", every token with loss."""

    option = "pretraining_data_dir"

    def __init__(self, options: PretrainOptions, context: TaskContext) -> None:
        # What is learned is text as it is, and no dialogue: the export must not write prompts as one.
        tokenizer = with_template(context.tokenizer, None)
        super().__init__(options.pretraining_data_dir, replace(context, tokenizer=tokenizer), options.data_weights)
        self.label_smoothing = options.label_smoothing
        self.had_template = bool(context.tokenizer.chat_template)
        self.title_field, self.content_field = options.title_field, options.content_field

    def describe(self) -> dict[str, Any]:
        return {"title_field": self.title_field, "content_field": self.content_field}

    def parse(self, row: Row) -> str | Tokenised:
        fields = row.fields  # of which those that are null count as absent
        if self.content_field is None:
            tokenised = tokenised_of(fields, self.vocabulary, all_carry_loss=True)
            if tokenised is not None:
                return tokenised
        text: str = self.encoder.as_characters(document_of(fields, self.title_field, self.content_field))
        return text

    def text_format(self) -> str:
        return super().text_format() + "; the export has no chat template" * self.had_template

    def add_samples(self, parsed: list[Any], block: SampleBlock) -> None:
        texts = [document for document in parsed if not isinstance(document, Tokenised)]
        encoded = self.encoder.encode(texts)
        block.report.altered += self.encoder.altered(texts, encoded)
        ids = iter(encoded)
        for number, document in enumerate(parsed):
            block.begin(number)
            if isinstance(document, Tokenised):
                self._add(document.token_ids, document.supervised, block, document.weights)
            else:
                tokens = [*self.encoder.begin, *next(ids), self.tokenizer.eos_token_id]
                self._add(tokens, b"\0" + b"\1" * (len(tokens) - 1), block)

    def _add(
        self, tokens: list[int], supervised: bytes, block: SampleBlock, weights: list[float] | None = None
    ) -> None:
        """Add the windows of a document, but for those in which nothing carries loss."""
        # A window begins with the last token of the previous one, so that every token except the
        # document's first is predicted exactly once.
        stride = self.context.max_seq_length - 1
        for start in range(0, len(tokens) - 1, stride):
            carrying = supervised[start + 1 : start + stride + 1]
            if 1 in carrying:
                window = slice(start, start + stride + 1)
                block.add(tokens[window], b"\0" + carrying, weights and weights[window])

    def example_prompt(self, parsed: Any) -> str:
        if isinstance(parsed, Tokenised):
            text: str = self.tokenizer.decode(parsed.token_ids[:EXAMPLE_CHARACTERS], skip_special_tokens=True)
        else:
            text = self.encoder.readable(parsed)
        return text[:EXAMPLE_CHARACTERS]


def document_of(fields: Mapping[str, Any], title_field: str, content_field: str | None) -> str:
    """The document of a row. Raises UnusableRowError where it has none."""
    refuse_weight(fields)
    names = (content_field,) if content_field else CONTENT_FIELDS
    present = [name for name in names if name in fields]
    found = next((name for name in present if fields.get(name) is not None), next(iter(present), None))
    if found is None:
        instead = "" if content_field else " (content_field names another)"
        raise missing(fields, list(names), instead)
    content = text_of(fields, found)
    if fields.get(title_field) is None:
        if not content:
            raise UnusableRowError(f"field {found!r} is empty")
        return content
    title = text_of(fields, title_field)
    if not (title or content):
        raise UnusableRowError(f"fields {title_field!r} and {found!r} are empty")
    return f"{title}\n{content}"


def text_of_row(fields: Mapping[str, Any], options: PretrainFormat) -> str:
    """The text of a row, to train a tokenizer on: its document, or else the turns of its conversation.

    Raises UnusableRowError where it has neither.
    """
    try:
        return document_of(fields, options.title_field, options.content_field)
    except UnusableRowError as problem:
        if options.content_field is not None or any(fields.get(name) is not None for name in CONTENT_FIELDS):
            raise
        try:
            turns = conversation_of(fields, None, None).turns
        except UnusableRowError:
            raise problem from None
    return "\n".join(turn.text for turn in turns if turn.text)
