"""A task whose samples come from rows of files, which are tokenised once and kept in the token cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING
from typing import Any

from panda.data.conversations import UnusableRowError
from panda.data.ingredients import code_of
from panda.data.ingredients import tokenizer_ingredients
from panda.data.reading import BadRow
from panda.data.reading import Fields
from panda.data.reading import Row
from panda.data.reading import data_files
from panda.data.reading import identities
from panda.data.reading import other_files
from panda.data.reading import rows_of
from panda.data.reading import without
from panda.registry.contexts import TaskContext
from panda.tasks.language_modelling import LanguageModelling
from panda.weights.tokenizers import rows_needed

if TYPE_CHECKING:
    from panda.data.recipe import Recipe
    from panda.data.token_dataset import SampleBlock
    from panda.data.token_dataset import TokenDataset


class TextTask(LanguageModelling):
    """Rows to samples: a subclass says what a row means, and how that becomes tokens."""

    option: str
    """The key that says where the data is."""

    def __init__(self, location: str, context: TaskContext) -> None:
        super().__init__(context)
        self.location = location
        self.files = data_files(location, context.reader.suffixes, self.option)
        self.held_out_files = 0
        """Files at ``location`` that are not read, since they are held out."""
        if context.held_out is not None:
            self._leave_out(identities(context.held_out))

    def _leave_out(self, held_out: set[tuple[int, int]]) -> None:
        """Leave the files ``held_out`` out, unless there are no others: the run evaluates on what it trains on."""
        if kept := without(self.files, held_out):
            self.held_out_files = len(self.files) - len(kept)
            self.files = kept

    @abstractmethod
    def parse(self, row: Row) -> Any:
        """The meaning of ``row``, for ``add_samples``. Raises UnusableRowError where it cannot be trained on.

        ``row.fields`` remembers which fields were read; the others are reported as unused.
        """

    @abstractmethod
    def add_samples(self, parsed: list[Any], block: SampleBlock) -> None:
        """Tokenise what ``parse`` returned for some rows, and add the samples to ``block``."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The options that decide which tokens come out, as plain objects: part of the address in the token cache."""

    @abstractmethod
    def example_prompt(self, parsed: Any) -> str:
        """A prompt made from what ``parse`` returned for a row; empty for none."""

    def reading(self, location: str, option: str) -> TextTask:
        other = copy(self)
        other.option, other.location, other.held_out_files = option, location, 0
        other.files = data_files(location, self.context.reader.suffixes, option)
        return other

    def dataset(self) -> TokenDataset:
        cache = self.context.token_cache
        dataset = cache.samples(self.recipe()) if cache else self.recipe().in_memory()
        if others := other_files(self.location, self.context.reader.suffixes):
            files = "1 file is" if (count := others.total()) == 1 else f"{count:,} files are"
            kinds = ", ".join(kind for kind, _ in others.most_common(5))
            dataset.report.notes.append(f"{self.option}: {files} of other kinds, and not read: {kinds}")
        if self.held_out_files:
            files = "1 file is" if self.held_out_files == 1 else f"{self.held_out_files:,} files are"
            dataset.report.notes.append(f"{self.option}: {files} held out by eval_data_dir, and not trained on")
        return dataset

    @cached_property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        return rows_needed(self.tokenizer)

    def recipe(self) -> Recipe:
        """The files, how they become samples, and everything else that decides which tokens come out."""
        from panda.data.recipe import Recipe

        reader = self.context.reader
        return Recipe(
            option=self.option,
            location=self.location,
            files=self.files,
            reader=reader,
            tokenise=self.tokenise,
            vocabulary=self.vocabulary,
            ingredients={
                "task": [code_of(self), self.describe()],
                "reader": [code_of(reader), repr(self.context.reader_options), repr(self.context.reader_context)],
                "max_seq_length": self.context.max_seq_length,
                "tokenizer": tokenizer_ingredients(self.tokenizer),
            },
        )

    def tokenise(self, rows: list[Row | BadRow]) -> SampleBlock:
        """The samples of ``rows``, and a report of the rows that make none and of the fields that were not used."""
        from panda.data.token_dataset import SampleBlock

        block = SampleBlock()
        block.report.rows = len(rows)
        parsed = []
        for row in rows:
            try:
                good = _good(row)
                fields = Fields(good.fields)
                parsed.append(self.parse(replace(good, fields=fields)))
                for name in fields.unused():
                    block.report.add_unused(name)
            except UnusableRowError as problem:
                block.report.add_bad(BadRow(row.file, row.number, str(problem)))
        self.add_samples(parsed, block)
        return block

    def example_prompts(self, count: int) -> list[str]:
        return [prompt for parsed in islice(self._parsed(), count) if (prompt := self.example_prompt(parsed))]

    def _parsed(self) -> Iterator[Any]:
        for file in self.files:
            for row in rows_of(self.context.reader, file):
                try:
                    yield self.parse(_good(row))
                except UnusableRowError:
                    continue


def _good(row: Row | BadRow) -> Row:
    if isinstance(row, BadRow):
        raise UnusableRowError(row.problem)
    return row
