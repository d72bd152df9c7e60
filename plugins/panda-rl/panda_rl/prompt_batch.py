"""Batches of prompts, before completions are drawn. Imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field

from panda.data.batches import Batch
from panda.data.batches import RowShape


@dataclass(frozen=True)
class PromptBatch(Batch):
    """Prompts, and how the run wants the rows of tokens that their completions make."""

    shape: RowShape = field(default_factory=RowShape)
