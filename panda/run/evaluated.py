"""A whole model evaluated on data, without a run: loss and token accuracy, and answers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the customary name

from panda.answers.sampling import Manner
from panda.answers.sampling import sampled
from panda.configuration.options import RunOptions
from panda.data.batches import TokenBatch
from panda.data.loading import step_batches
from panda.data.token_dataset import SampleSet
from panda.files.activity import Activity
from panda.models.forward.stretched_positions import needs_positions
from panda.registry.contexts import IGNORED_LABEL
from panda.run.assembly import lay_out_evaluation
from panda.run.generating import rows_at_once
from panda.tasks.scores import logits_of
from panda.tasks.task import Task

if TYPE_CHECKING:
    from panda.answers.assistant import Assistant
    from panda.answers.metric import Answer
    from panda.run.questions import Question


@dataclass(frozen=True)
class Measured:
    """What a model made of some samples, each counted once."""

    samples: int
    tokens: int
    supervised_tokens: int
    loss_sum: float
    """Over the supervised tokens, each with its weight."""
    units: float
    """The sum of these weights; without weights, the number of tokens."""
    right: int
    """Supervised tokens that were the likeliest one."""

    def __add__(self, other: Measured) -> Measured:
        return Measured(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def numbers(self) -> dict[str, float]:
        """By name, for tables and JSON."""
        loss = self.loss_sum / self.units if self.units else math.nan
        return {
            **{"samples": self.samples, "tokens": self.tokens, "supervised_tokens": self.supervised_tokens},
            "loss": loss,
            "perplexity": math.exp(loss) if loss < math.log(1e300) else math.inf,
            "token_accuracy": self.right / self.supervised_tokens if self.supervised_tokens else math.nan,
        }


@torch.no_grad()
def measure(
    module: torch.nn.Module, task: Task, dataset: SampleSet, options: RunOptions, device: torch.device, shown: Activity
) -> Measured:
    """What ``module``, a causal model in evaluation mode on ``device``, makes of ``dataset``.

    ``task``, one of next-token prediction, collates the samples; scores are taken in float32 and summed in float64.
    """
    found = Measured(len(dataset), 0, 0, 0.0, 0.0, 0)
    for batch in _batches(module, task, dataset, options, device):
        shown.advance(len(batch.lengths))
        labels = batch.labels[:, 1:].flatten()
        where = labels != IGNORED_LABEL
        logits = logits_of(module, batch)[:, :-1].flatten(0, 1)[where].float()
        labels = labels[where]
        losses = F.cross_entropy(logits, labels, reduction="none").double()
        if batch.weights is not None:
            losses = losses * batch.weights[:, 1:].flatten()[where]
        right = int((logits.argmax(-1) == labels).sum())
        found += Measured(0, batch.tokens, len(labels), float(losses.sum()), float(batch.units), right)
    return found


def _batches(
    module: torch.nn.Module, task: Task, dataset: SampleSet, options: RunOptions, device: torch.device
) -> Iterator[TokenBatch]:
    """Batches of all samples, none of them idle, on ``device``."""
    for some in step_batches(
        lay_out_evaluation(options, dataset, 1),
        task.collate,
        rank=0,
        num_workers=options.num_workers,
        prefetch_factor=options.prefetch_factor,
        pin_memory=device.type == "cuda",
        positions=needs_positions(module),
    ):
        for batch in some:
            if not batch.idle:
                assert isinstance(batch, TokenBatch)
                yield batch.to(device)


def answered(
    assistant: Assistant, task: Task, questions: Sequence[Question], most: int, shown: Activity
) -> list[Answer]:
    """The answers of ``assistant`` to ``questions``, of the likeliest tokens, at most ``most`` each."""
    order = sorted(range(len(questions)), key=lambda number: len(questions[number].prompt))
    longest = max(len(question.prompt) for question in questions) + most
    rows, decoding, found = rows_at_once(assistant.model, longest, assistant.device), assistant.decoding, {}
    for start in range(0, len(order), min(rows, MOST_ROWS)):
        turn = order[start : start + min(rows, MOST_ROWS)]
        made: Any = sampled(
            assistant.model,
            [questions[number].prompt for number in turn],
            np.zeros((len(turn), most)),
            Manner(most, temperature=0.0),
            end_tokens=decoding.ends,
            pad_token_id=task.pad_token_id,
            device=assistant.device,
            processors=decoding.processors,
            criteria=decoding.criteria(assistant.tokenizer, timed=False),
        )
        for number, each in zip(turn, made, strict=True):
            ids, ended = each.token_ids, each.ended
            found[number] = questions[number].answered(task, ids, ended=ended, ends=decoding.ends)
        shown.advance(len(turn))
    return [found[number] for number in range(len(questions))]


MOST_ROWS = 32
"""Rows that are answered at once: more would say for long nothing of how far it is."""
