"""The ``dpo`` task: direct preference optimisation, and IPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any
from typing import Literal

from panda import Meta
from panda import UserError
from panda import register_task
from panda.registry.contexts import TaskContext
from panda.tasks.task import Better
from panda.tasks.task import Loss
from panda.tasks.task import Reference

from panda_preference.answers import OF_LOG_PROBS
from panda_preference.answers import OF_REWARDS
from panda_preference.answers import PairTask
from panda_preference.answers import ReferenceOptions
from panda_preference.answers import log_prob_metrics
from panda_preference.answers import reward_metrics

if TYPE_CHECKING:
    import torch
    from panda.data.batches import TokenBatch


@dataclass(frozen=True)
class DpoOptions(ReferenceOptions):
    """Options of the dpo task."""

    beta: Annotated[float, Meta(gt=0)] = 0.1
    """How strongly the model is held to the reference: the factor of rewards. For `ipo`, the paper's tau."""
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    """`sigmoid`: DPO (arXiv 2305.18290); `ipo`: IPO (arXiv 2310.12036), of log-probabilities a token."""
    reference_free: bool = False
    """Without a reference: rewards are the log-probabilities themselves, times beta."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference_free and self.reference_path is not None:
            raise UserError("reference_free: the run has a reference_path too, which it would not use. Leave one out.")


@register_task("dpo", options=DpoOptions)
class Dpo(PairTask):
    """Preferences without a reward model: DPO and IPO, of pairs "chosen" and "rejected"."""

    metrics: Mapping[str, Better] = {**OF_REWARDS, **OF_LOG_PROBS}

    def __init__(self, options: DpoOptions, context: TaskContext) -> None:
        super().__init__(options, context)
        self.beta, self.loss_type, self.reference_free = options.beta, options.loss_type, options.reference_free

    @classmethod
    def reference_of(cls, options: DpoOptions) -> Reference | None:
        return None if options.reference_free else Reference(options.reference_path)

    def loss(self, model: Any, batch: TokenBatch, statistics: Mapping[str, torch.Tensor] = {}) -> Loss:
        from panda.tasks.scores import sequence_log_probs

        from panda_preference import losses

        log_probs = sequence_log_probs(model, batch)
        ratios = log_probs
        if not self.reference_free:
            ratios = log_probs - sequence_log_probs(self.reference, batch)  # which has no gradients
        chosen, rejected = ratios.chunk(2)
        if self.loss_type == "ipo":
            mean_chosen, mean_rejected = (ratios / answer_lengths(batch)).chunk(2)
            of_pairs = losses.ipo(mean_chosen, mean_rejected, self.beta)
        else:
            of_pairs = losses.dpo(chosen, rejected, self.beta)
        metrics = reward_metrics(self.beta * chosen, self.beta * rejected)
        return Loss(of_pairs.sum(), metrics | log_prob_metrics(*log_probs.chunk(2)))


def answer_lengths(batch: TokenBatch) -> torch.Tensor:
    """The tokens of each answer [rows], at least 1."""
    from panda.registry.contexts import IGNORED_LABEL

    return (batch.labels[:, 1:] != IGNORED_LABEL).sum(1).clamp(min=1)
