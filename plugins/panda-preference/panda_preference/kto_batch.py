"""Batches of the ``kto`` task. Imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import fields
from dataclasses import replace

import torch
from panda.data.batches import TokenBatch


@dataclass(frozen=True)
class AnswersBatch(TokenBatch):
    """Answers, and beside them answers to other prompts."""

    mismatched: TokenBatch | None = None

    @classmethod
    def of(cls, answers: TokenBatch, mismatched: TokenBatch) -> AnswersBatch:
        return cls(**{each.name: getattr(answers, each.name) for each in fields(answers)}, mismatched=mismatched)

    def to(self, device: torch.device) -> AnswersBatch:
        assert self.mismatched is not None
        return replace(super().to(device), mismatched=self.mismatched.to(device))

    def pin_memory(self) -> AnswersBatch:
        assert self.mismatched is not None
        return replace(super().pin_memory(), mismatched=self.mismatched.pin_memory())
