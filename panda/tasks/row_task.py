"""A task whose samples come from rows of files, which are tokenised once and kept in the token cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from panda.data.conversations import UnusableRowError
from panda.data.fields import TEXT
from panda.data.fields import Field
from panda.data.ingredients import code_of
from panda.data.ingredients import tokenizer_ingredients
from panda.data.locations import data_sets
from panda.data.locations import each_of
from panda.data.locations import files_by_location
from panda.data.locations import identities
from panda.data.locations import named_splits
from panda.data.locations import other_files
from panda.data.locations import repeated_paths
from panda.data.locations import without
from panda.data.reading import BadRow
from panda.data.reading import Fields
from panda.data.reading import Row
from panda.data.reading import rows_of
from panda.files.terminal import number_of
from panda.registry import UserError
from panda.registry.contexts import TaskContext
from panda.tasks.task import ShownPart
from panda.tasks.task import Task
from panda.weights.tokenizers import rows_needed

if TYPE_CHECKING:
    from panda.data.locations import Locations
    from panda.data.recipe import Recipe
    from panda.data.token_dataset import Sample
    from panda.data.token_dataset import SampleBlock
    from panda.data.token_dataset import SampleSet
    from panda.data.token_dataset import TokenDataset


class RowTask(Task):
    """Rows to samples: a subclass says what a row means, and which arrays that makes."""

    option: str
    """The key that says where the data is."""
    fields: tuple[Field, ...] = TEXT
    """The arrays of a sample."""

    def __init__(self, locations: Locations, context: TaskContext, weights: Sequence[float] = ()) -> None:
        """``weights``: of each location, the passes over its data in an epoch; none for one pass over all."""
        super().__init__(context)
        self._passes = tuple(weights)
        self._look_at(locations, self.option)
        if context.held_out is not None:
            self._leave_out(identities(context.held_out))

    def _look_at(self, locations: Locations, option: str) -> None:
        self.option, self.locations = option, each_of(locations)
        self._files = files_by_location(locations, self.context.reader.suffixes, option)
        self.held_out_files = 0
        """Files at the locations that are not read, since they are held out."""

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        return [file for files in self._files for file in files]

    def _leave_out(self, held_out: set[tuple[int, int]]) -> None:
        """Leave the files ``held_out`` out, unless there are no others: the run evaluates on what it trains on."""
        before = len(self.files)
        kept = [without(files, held_out) for files in self._files]
        if any(kept):
            self._files = kept
            self.held_out_files = before - len(self.files)

    @abstractmethod
    def parse(self, row: Row) -> Any:
        """The meaning of ``row``, for ``add_samples``. Raises UnusableRowError where it cannot be trained on.

        ``row.fields`` remembers which fields were read; the others are reported as unused.
        """

    @abstractmethod
    def add_samples(self, parsed: list[Any], block: SampleBlock) -> None:
        """Tokenise what ``parse`` returned for some rows, and add the samples to ``block``.

        Samples that lose tokens are counted: ``block.report.truncated``. ``block.begin(number)``, before the samples of
        ``parsed[number]``, lets reports name their row.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The options that decide which tokens come out, as plain objects: part of the address in the token cache."""

    @abstractmethod
    def example_prompt(self, parsed: Any) -> str:
        """A prompt made from what ``parse`` returned for a row; empty for none."""

    def parts(self, sample: Sample) -> list[ShownPart]:
        masks = {each.along: each.name for each in self.fields if each.kind == "supervised"}
        several = sum(each.kind == "tokens" for each in self.fields) > 1
        found = []
        for name in (each.name for each in self.fields if each.kind == "tokens"):
            token_ids = sample[name].tolist()
            supervised = sample[masks[name]].tolist() if name in masks else [False] * len(token_ids)
            found.append(ShownPart(name if several else "", token_ids, supervised))
        return found

    def reading(self, locations: Locations, option: str) -> RowTask:
        other = copy(self)
        other._passes = ()
        other._look_at(locations, option)
        return other

    def dataset(self) -> SampleSet:
        from panda.data.token_dataset import MixedDataset

        datasets = self.datasets()
        return MixedDataset(datasets) if self._passes else datasets[0][1]

    def datasets(self) -> list[tuple[str, TokenDataset, float]]:
        """The data sets of the task: of each the location, its samples, and the passes over them in an epoch.

        One, without a location, unless locations have weights.
        """
        found = [("", self._samples(self.recipe()), 1.0)] if not self._passes else []
        for location, files, weight in zip(self.locations, self._files, self._passes, strict=False):
            if files:  # else all of them are held out
                found.append((location, self._samples(self._recipe(files, location)), weight))
        notes = found[0][1].report.notes
        notes += [data_set.describe() for data_set in data_sets(self.locations)]
        if others := other_files(self.locations, self.context.reader.suffixes):
            files_are = number_of(others.total(), "file is", "files are")
            kinds = ", ".join(kind for kind, _ in others.most_common(5))
            notes.append(f"{self.option}: {files_are} of other kinds, and not read: {kinds}")
        for location, files in zip(self.locations, self._files, strict=True):
            if names := " and ".join(named_splits(location, files)):
                if self.option == "eval_data_dir":
                    notes.append(f"note: {location}: files named train are evaluated on too, beside {names}")
                else:
                    notes.append(
                        f"note: files named {names} are trained on too; `{location}:train` takes those of train"
                    )
        if again := repeated_paths(self.locations, self.context.reader.suffixes, self.option):
            paths = number_of(again, "path leads", "paths lead")
            notes.append(f"{self.option}: {paths} to files that other paths lead to as well; a file is read once")
        if self.held_out_files:
            files_are = number_of(self.held_out_files, "file is", "files are")
            notes.append(f"{self.option}: {files_are} held out by eval_data_dir, and not trained on")
        return found

    def _samples(self, recipe: Recipe) -> TokenDataset:
        cache = self.context.token_cache
        return cache.samples(recipe) if cache else recipe.in_memory()

    @cached_property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        return rows_needed(self.tokenizer)

    def recipe(self) -> Recipe:
        """The files, how they become samples, and everything else that decides which tokens come out."""
        return self._recipe(self.files, ", ".join(self.locations))

    def _recipe(self, files: list[Path], location: str) -> Recipe:
        from panda.data.recipe import Recipe

        reader = self.context.reader
        return Recipe(
            option=self.option,
            location=location,
            files=files,
            reader=reader,
            tokenise=self.tokenise,
            vocabulary=self.vocabulary,
            fields=self.fields,
            ingredients={
                "task": [code_of(self), self.describe()],
                **({} if self.fields is TEXT else {"fields": [asdict(each) for each in self.fields]}),
                "reader": [code_of(reader), repr(self.context.reader_options), repr(self.context.reader_context)],
                "max_seq_length": self.context.max_seq_length,
                "tokenizer": tokenizer_ingredients(self.tokenizer),
            },
        )

    def tokenise(self, rows: list[Row | BadRow]) -> SampleBlock:
        """The samples of ``rows``, and a report of the rows that make none and of the fields that were not used."""
        from panda.data.token_dataset import SampleBlock

        block = SampleBlock(self.fields)
        block.report.rows = len(rows)
        parsed, used = [], []
        for row in rows:
            try:
                good = _good(row)
                fields = Fields(good.fields)
                parsed.append(self.parse(replace(good, fields=fields)))
                used.append(good)
                for name in fields.unused():
                    block.report.add_unused(name)
            except UnusableRowError as problem:
                block.report.add_bad(BadRow(row.file, row.number, str(problem)))
            except Exception as problem:  # a fault of `parse`, of any author
                problem.add_note(f"`parse` was given {row.file}, row {row.number}. UnusableRowError leaves a row out.")
                raise
        block.rows = used
        self.add_samples(parsed, block)
        block.rows = ()  # what is sent to the process that writes it
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


def check_weights(key: str, weights: Sequence[float], locations: Locations) -> None:
    """Raise UserError unless there are as many ``weights``, the value of ``key``, as ``locations``, or none."""
    if weights and len(weights) != len(each_of(locations)):
        raise UserError(
            f"{key}: {number_of(len(weights), 'weight is', 'weights are')} given for"
            f" {number_of(len(each_of(locations)), 'path')}:"
            f" {', '.join(each_of(locations))}. Give each path its weight, in their order."
        )


def _good(row: Row | BadRow) -> Row:
    if isinstance(row, BadRow):
        raise UnusableRowError(row.problem)
    return row
