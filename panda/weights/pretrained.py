"""A checkpoint on disk or on the hub: its configuration, its tensors, its tokenizer, its identity.

Imports torch, and fetches weights, only when tensors or their identity are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from panda.weights.delta import applied
from panda.weights.formats import Format
from panda.weights.formats import left_aside
from panda.weights.hub import Repository
from panda.weights.identity import identity_of
from panda.weights.shards import shard_names
from panda.weights.shards import shards
from panda.weights.tokenizers import has_tokenizer

if TYPE_CHECKING:
    import torch

    from panda.weights.stored_tensor import Weights

_BESIDE = (
    "tokenizer*",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
"""Files that belong to a checkpoint beside its configuration and weights."""


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint; its weights are not read, or fetched, before they are asked for."""

    folder: Path
    found: str
    """Where it was found, in words."""
    format: Format
    config: Mapping[str, Any]
    """Its config.json, or the equivalent of one."""
    base: Pretrained | None = None
    """Where it is a delta: the checkpoint to which it is added."""
    repository: Repository | None = None
    """Where to fetch its weights from, if they are on the hub and not in its cache."""
    name: str | None = None
    """Its name on the hub, if it was found by that name."""
    adapters: Path | None = None
    """The folder of adapters on it with which training starts."""
    stored_rows: int | None = None
    """The rows of its embedding, where ``config`` states more, which are to be added."""

    @property
    def vocabulary(self) -> int | None:
        """The rows of its embedding; None if its configuration does not say."""
        for holder in (self.config, self.config.get("text_config"), self.config.get("context")):
            if isinstance(holder, Mapping) and isinstance(holder.get("vocab_size"), int):
                rows: int = holder["vocab_size"]
                return rows
        return None

    @property
    def config_file(self) -> Path:
        return self.folder / self.format.described_in

    def fetch(self) -> None:
        """Fetch the files of weights that are missing on this machine. Raises UserError where that fails."""
        if self.repository:
            self.repository.fetch(shard_names(self.folder, self.format.file_names, self.repository.files))

    def weights(self) -> Weights:
        """Its tensors, by name, fetched first where they are on the hub. Raises UserError for a damaged file.

        Each call reads and checks the headers of all files: keep the result.
        """
        self.fetch()
        weights = self.format.weights(self.folder)
        if self.base is None:
            return weights
        return applied(weights, self.base.weights(), source=str(self.folder), base_source=str(self.base.folder))

    def with_tokenizer(self) -> Pretrained | None:
        """Itself, or its base if only that has a tokenizer; None if neither has one. That of adapters comes first."""
        if self.adapters and has_tokenizer(self.adapters):
            return replace(self, folder=self.adapters, name=None, adapters=None)
        if has_tokenizer(self.folder):
            return self
        return self.base.with_tokenizer() if self.base else None

    def files_beside(self) -> list[Path]:
        """Files of its tokenizer, chat template and generation config."""
        return sorted({file for pattern in _BESIDE for file in self.folder.glob(pattern) if file.is_file()})

    @cached_property
    def identity(self) -> str:
        """The hash that distinguishes its weights from others, computed once. Raises UserError for a damaged file."""
        self.fetch()
        base = self.base.identity if self.base else None
        return identity_of(shards(self.folder, self.format.file_names), base)

    def describe(self) -> str:
        """One line: what was found, and where."""
        kind = "a delta, " if self.base else ""
        model = self.config.get("model_type", self.config.get("panda_model"))
        line = f"{self.folder} ({self.found}): {kind}{self.format.name}, {model}"
        present = self.repository.files if self.repository else [file.name for file in self.folder.iterdir()]
        if aside := left_aside(present, self.format):
            line += f" ({aside[0]}{' and others' * (len(aside) > 1)} not read)"
        if self.adapters:
            line += f"; with the adapters in {self.adapters}"
        return f"{line}; added to {self.base.describe()}" if self.base else line


def fitted(module: torch.nn.Module, pretrained: Pretrained, parts: Sequence[str] = ()) -> Weights:
    """The tensors of ``pretrained`` for each name in ``module``. Raises UserError where they do not fit.

    Those of ``parts``, which ``module`` is going to get, and of parts that another task gave it are left out.
    """
    from panda.weights.conversion import as_in_module
    from panda.weights.matching import matched
    from panda.weights.matching import unwrapped
    from panda.weights.parts import divided
    from panda.weights.parts import parts_of

    config: Any = getattr(module, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    rows, wanted = pretrained.vocabulary, getattr(text, "vocab_size", None)
    grow = (rows, wanted) if rows and wanted and wanted > rows else None
    source = str(pretrained.folder)
    stored, _ = divided(unwrapped(module, pretrained.weights()), (*parts_of(pretrained.config), *parts))
    weights = as_in_module(module, stored, source=source)
    return matched(module, weights, source=source, grow_rows=grow)
