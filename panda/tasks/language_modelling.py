"""Next-token prediction: the loss that all tasks of causal language models share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

from panda.registry import Meta
from panda.registry.contexts import Better
from panda.registry.contexts import TaskContext
from panda.tasks.task import NO_STATISTICS
from panda.tasks.task import ShownPart
from panda.tasks.task import Statistics
from panda.tasks.task import Task
from panda.tasks.task import refuse_without_end

if TYPE_CHECKING:
    import torch

    from panda.data.batches import Batch
    from panda.data.batches import RowShape
    from panda.data.token_dataset import Sample


@dataclass(frozen=True)
class NextTokenOptions:
    """Options of every task of next-token prediction."""

    label_smoothing: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of each label's probability that is spread over all entries of the vocabulary, in training only: the loss
    of an evaluation is without it."""


class LanguageModelling(Task):
    """A task whose loss is the cross-entropy of the supervised tokens. Samples have the fields ``TEXT``."""

    unit = "supervised_tokens"
    layouts = ("padded", "grouped", "packed")
    metrics: Mapping[str, Better] = {}
    label_smoothing = 0.0

    def __init__(self, context: TaskContext) -> None:
        super().__init__(context)
        refuse_without_end(self.tokenizer)

    def collate(self, rows: list[list[Sample]], shape: RowShape) -> Batch:
        from panda.data.batches import token_batch

        return token_batch([[_sequence(sample) for sample in row] for row in rows], self.pad_token_id, shape)

    def loss(self, model: Any, batch: Any, statistics: Statistics = NO_STATISTICS) -> torch.Tensor:
        """Cross-entropy of the supervised tokens of ``batch``, **summed**, in float32; a scalar."""
        from panda.tasks.scores import next_token_loss

        return next_token_loss(model, batch, label_smoothing=self.label_smoothing if model.training else 0.0)

    def parts(self, sample: Sample) -> list[ShownPart]:
        return [ShownPart("", sample["token_ids"].tolist(), sample["supervised"].tolist())]


def _sequence(sample: Sample) -> tuple[Any, ...]:
    given = sample["token_ids"], sample["supervised"]
    return (*given, sample["weights"]) if "weights" in sample else given
