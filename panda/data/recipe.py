"""A recipe: data files, and how they become samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any

from panda.data.fields import TEXT
from panda.data.fields import Field
from panda.data.origin import origin_of
from panda.data.reading import Reader
from panda.data.token_dataset import SampleBlock
from panda.data.token_dataset import TokenDataset
from panda.data.tokenising import Tokenise
from panda.data.tokenising import tokenised_blocks
from panda.registry import UserError


@dataclass(frozen=True)
class Recipe:
    """Data files and how they become samples."""

    option: str
    """The key that says where the data is, for errors."""
    location: str
    """Its value."""
    files: Sequence[Path]
    reader: Reader
    tokenise: Tokenise
    vocabulary: int
    """Token ids are below this."""
    ingredients: dict[str, Any]
    """Everything besides the content of the files that decides which tokens come out, as plain objects."""
    fields: tuple[Field, ...] = TEXT
    """The arrays of a sample."""

    def in_memory(self) -> TokenDataset:
        """The samples, tokenised now and kept in memory. Raises UserError where the data cannot be used."""
        block = SampleBlock(self.fields)
        for part in tokenised_blocks(self.files, self.reader, self.tokenise, fields=self.fields):
            block.extend(part)
        return self.usable(TokenDataset.of(block))

    def usable(self, dataset: TokenDataset, hashes: Sequence[str] = ()) -> TokenDataset:
        """``dataset``, which was made by this recipe, with its origin. ``hashes``: of the content of the files.

        Raises UserError, with the reasons, where it has no sample.
        """
        if len(dataset) == 0:
            reasons = "".join(f"\n  {line}" for line in dataset.report.lines())
            raise UserError(f"{self.option}: {self.location!r} has no row that can be trained on.{reasons}")
        made = {**self.ingredients, "vocabulary": self.vocabulary}
        origin = origin_of(self.location, self.files, hashes, dataset.report.rows, made)
        return replace(dataset, origin=origin, files=tuple(self.files) if dataset.directory else dataset.files)
