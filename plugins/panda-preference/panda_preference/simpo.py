"""The ``simpo`` task: preferences without a reference model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

from panda import Meta
from panda import register_task
from panda.registry.contexts import TaskContext
from panda.tasks.task import Better
from panda.tasks.task import Loss

from panda_preference.answers import OF_LOG_PROBS
from panda_preference.answers import OF_REWARDS
from panda_preference.answers import PairTask
from panda_preference.answers import PreferenceOptions
from panda_preference.answers import log_prob_metrics
from panda_preference.answers import reward_metrics
from panda_preference.dpo import answer_lengths

if TYPE_CHECKING:
    import torch
    from panda.data.batches import TokenBatch


@dataclass(frozen=True)
class SimpoOptions(PreferenceOptions):
    """Options of the simpo task."""

    beta: Annotated[float, Meta(gt=0)] = 2.0
    """The factor of rewards, which are log-probabilities a token."""
    simpo_gamma: Annotated[float, Meta(ge=0)] = 1.0
    """By how much the rewards of a pair should differ."""


@register_task("simpo", options=SimpoOptions)
class Simpo(PairTask):
    """Preferences without a reference model, by log-probabilities a token (SimPO, arXiv 2405.14734)."""

    metrics: Mapping[str, Better] = {**OF_REWARDS, **OF_LOG_PROBS}

    def __init__(self, options: SimpoOptions, context: TaskContext) -> None:
        super().__init__(options, context)
        self.beta, self.gamma = options.beta, options.simpo_gamma

    def loss(self, model: Any, batch: TokenBatch, statistics: Mapping[str, torch.Tensor] = {}) -> Loss:
        from panda.tasks.scores import sequence_log_probs

        from panda_preference import losses

        chosen, rejected = (sequence_log_probs(model, batch) / answer_lengths(batch)).chunk(2)
        of_pairs = losses.simpo(chosen, rejected, self.beta, self.gamma)
        metrics = reward_metrics(self.beta * chosen, self.beta * rejected)
        return Loss(of_pairs.sum(), metrics | log_prob_metrics(chosen, rejected))
