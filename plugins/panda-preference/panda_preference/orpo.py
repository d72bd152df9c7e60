"""The ``orpo`` task: what is preferred is learned in fine-tuning, without a reference model."""

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

if TYPE_CHECKING:
    import torch
    from panda.data.batches import RowShape
    from panda.data.batches import TokenBatch
    from panda.data.token_dataset import Sample


@dataclass(frozen=True)
class OrpoOptions(PreferenceOptions):
    """Options of the orpo task."""

    beta: Annotated[float, Meta(ge=0)] = 0.1
    """The weight of the odds ratio beside the cross-entropy: the paper's lambda."""


@register_task("orpo", options=OrpoOptions)
class Orpo(PairTask):
    """Fine-tuning on preferred answers and away from others, in one loss (ORPO, arXiv 2403.07691)."""

    metrics: Mapping[str, Better] = {
        **OF_REWARDS,
        **OF_LOG_PROBS,
        "nll_loss": "lower",
        "log_odds_ratio": "higher",
        "log_odds_chosen": "higher",
    }
    shown = ("rewards/accuracies", "nll_loss")

    def __init__(self, options: OrpoOptions, context: TaskContext) -> None:
        super().__init__(options, context)
        self.beta = options.beta

    def collate(self, rows: list[list[Sample]], shape: RowShape) -> TokenBatch:
        """As other pairs, and the preferred ones with labels for the prompt, whose cross-entropy counts too.

        ``lengths`` [rows]: the tokens of each answer, the last ones that have labels.
        """
        import numpy as np
        import torch

        pairs = [sample for row in rows for sample in row]
        lengths = [sample[f"{side}_supervised"] for side in ("chosen", "rejected") for sample in pairs]
        of_answers = torch.zeros(len(lengths), max(map(len, lengths)), dtype=torch.bool)
        for row, supervised in enumerate(lengths):
            of_answers[row, : len(supervised)] = torch.from_numpy(np.array(supervised, dtype=np.bool_))
        all_but_first = (np.arange(len(sample["chosen"])) > 0 for sample in pairs)
        sequences = [
            *([(sample["chosen"], learned)] for sample, learned in zip(pairs, all_but_first, strict=True)),
            *([(sample["rejected"], sample["rejected_supervised"])] for sample in pairs),
        ]
        return self.batch(sequences, shape, len(pairs), {"of_answers": of_answers})

    def statistics(self, model: Any, batch: TokenBatch) -> Mapping[str, torch.Tensor]:
        """The pairs of the step, and the tokens whose cross-entropy is averaged. The model is not needed."""
        import torch

        tokens = _has_label(batch).chunk(2)[0].sum()
        return {"tokens": tokens, "pairs": torch.full_like(tokens, len(batch.labels) // 2)}

    def loss(self, model: Any, batch: TokenBatch, statistics: Mapping[str, torch.Tensor] = {}) -> Loss:
        from panda.tasks.scores import label_log_probs

        from panda_preference import losses

        log_probs = label_log_probs(model, batch)  # [rows, length - 1]
        of_answers = batch["of_answers"][:, 1:]
        in_answers = log_probs[:, : of_answers.shape[1]] * of_answers
        chosen, rejected = (in_answers.sum(1) / of_answers.sum(1).clamp(min=1)).chunk(2)
        cross_entropy = -log_probs.chunk(2)[0].sum()
        # The engine divides by pairs: the mean over tokens, those of the whole step, is brought to that.
        per_pair = (statistics["pairs"] / statistics["tokens"].clamp(min=1)).float()
        ratios = losses.log_odds_ratio(chosen, rejected).detach()
        import torch.nn.functional as F  # noqa: N812 - the customary name

        metrics = reward_metrics(self.beta * chosen, self.beta * rejected) | log_prob_metrics(chosen, rejected)
        metrics |= {
            "nll_loss": (cross_entropy.detach(), _has_label(batch).chunk(2)[0].sum()),
            "log_odds_ratio": (F.logsigmoid(ratios).sum(), len(ratios)),
            "log_odds_chosen": (ratios.sum(), len(ratios)),
        }
        return Loss(cross_entropy * per_pair + losses.orpo(chosen, rejected, self.beta).sum(), metrics)


def _has_label(batch: TokenBatch) -> torch.Tensor:
    from panda.registry.contexts import IGNORED_LABEL

    return batch.labels[:, 1:] != IGNORED_LABEL
