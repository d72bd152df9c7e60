"""A checkpoint on disk or on the hub: its configuration, its tensors, its tokenizer, what tells it from others.

Imports torch, and fetches weights, only when tensors or their identity are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from panda.weights.delta import applied
from panda.weights.formats import Format
from panda.weights.hub import Repository
from panda.weights.identity import identity
from panda.weights.shards import shard_names
from panda.weights.shards import shards
from panda.weights.tokenizers import has_tokenizer

if TYPE_CHECKING:
    import torch

    from panda.weights.stored_tensor import Weights

_BESIDE = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
"""What belongs to a checkpoint beside its configuration and weights."""


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint; nothing of its weights is read, or fetched, yet."""

    folder: Path
    found: str
    """Where it was found, in words."""
    format: Format
    config: Mapping[str, Any]
    """Its config.json, or what that would say."""
    base: Pretrained | None = None
    """Where it is a delta: what it is added to."""
    repository: Repository | None = None
    """What its weights are fetched from, where the hub has them and its cache has not."""
    name: str | None = None
    """Its name on the hub, where it was found by that."""

    @property
    def config_file(self) -> Path:
        return self.folder / self.format.described_in

    def fetch(self) -> None:
        """Have its files of weights here. Raises UserError where the hub does not give them."""
        if self.repository:
            self.repository.fetch(shard_names(self.folder, self.format.kind, self.repository.files))

    def weights(self) -> Weights:
        """Its tensors, by name; the headers of all files are read, and checked. Raises UserError for a damaged one.

        Where they are on the hub they are fetched first.
        """
        self.fetch()
        weights = self.format.weights(self.folder)
        if self.base is None:
            return weights
        return applied(weights, self.base.weights(), source=str(self.folder), base_source=str(self.base.folder))

    def with_tokenizer(self) -> Pretrained | None:
        """Itself, or its base where that alone has a tokenizer; None where neither has."""
        if has_tokenizer(self.folder):
            return self
        return self.base.with_tokenizer() if self.base else None

    def files_beside(self) -> list[Path]:
        """Files of its tokenizer, chat template and generation config."""
        return sorted(file for pattern in _BESIDE for file in self.folder.glob(pattern) if file.is_file())

    def identity(self, like: str | None = None) -> str:
        """What tells its weights from others; with ``like``, one that was recorded, in the form of that."""
        self.fetch()
        base = self.base.identity(like) if self.base else None
        return identity(shards(self.folder, self.format.kind), self.format.kind.pattern, base, like)

    def describe(self) -> str:
        """One line: what was found, where."""
        kind = "a delta, " if self.base else ""
        line = f"{self.folder} ({self.found}): {kind}{self.format.name}, {self.config['model_type']}"
        return f"{line}; added to {self.base.describe()}" if self.base else line


def base_weights(pretrained: Pretrained | None, like: str | None = None) -> str:
    """What adapters are trained on, in a word that tells it from other weights; in the form of ``like``, if that is."""
    return pretrained.identity(like) if pretrained else "random"


def fitted(module: torch.nn.Module, pretrained: Pretrained) -> Weights:
    """The tensors of ``pretrained`` for each name in ``module``. Raises UserError where they do not fit."""
    from panda.weights.matching import matched

    rows, wanted = pretrained.config.get("vocab_size"), getattr(getattr(module, "config", None), "vocab_size", None)
    grow = (rows, wanted) if rows and wanted and wanted > rows else None
    return matched(module, pretrained.weights(), source=str(pretrained.folder), grow_rows=grow)
