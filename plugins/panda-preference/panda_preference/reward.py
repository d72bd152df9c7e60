"""The ``reward`` task: a model that gives an answer a number, from pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Annotated
from typing import Any

from panda import Meta
from panda import register_task
from panda.data.fields import Field
from panda.registry.contexts import TaskContext
from panda.tasks.task import Better
from panda.tasks.task import Loss

from panda_preference.answers import OF_REWARDS
from panda_preference.answers import PairTask
from panda_preference.answers import PreferenceOptions
from panda_preference.answers import Written
from panda_preference.answers import reward_metrics

if TYPE_CHECKING:
    import torch
    from panda.data.batches import RowShape
    from panda.data.batches import TokenBatch
    from panda.data.token_dataset import Sample
    from panda.data.token_dataset import SampleBlock

HEAD = "score"
"""The name of the head, transformers' of models of sequence classification."""
SPREAD = 0.02
"""The standard deviation of its first weights, which is transformers' ``initializer_range`` of most models."""


@dataclass(frozen=True)
class RewardOptions(PreferenceOptions):
    """Options of the reward task."""

    center_rewards_coefficient: Annotated[float, Meta(ge=0)] = 0.0
    """The weight of the square of the sum of a pair's rewards, which keeps them around zero; 0.01 is usual."""


@register_task("reward", options=RewardOptions)
class RewardModel(PairTask):
    """A reward model: a number for an answer, read at its last token, higher for "chosen" than for "rejected"."""

    metrics: Mapping[str, Better] = OF_REWARDS
    fields = (*PairTask.fields, Field("margin", "float32"))
    has_margin = True

    def __init__(self, options: RewardOptions, context: TaskContext) -> None:
        super().__init__(options, context)
        self.centering = options.center_rewards_coefficient

    def add(self, chosen: Written, rejected: Written, values: tuple[Any, ...], block: SampleBlock) -> None:
        block.add_arrays(
            chosen=chosen.token_ids,
            chosen_supervised=chosen.supervised,
            rejected=rejected.token_ids,
            rejected_supervised=rejected.supervised,
            margin=list(values),
        )

    def collate(self, rows: list[list[Sample]], shape: RowShape) -> TokenBatch:
        """As other pairs, with the place ``last`` [rows] where each row is read, and ``margin`` [pairs]."""
        import torch

        pairs = [sample for row in rows for sample in row]
        sequences = [
            [(sample[side], sample[f"{side}_supervised"])] for side in ("chosen", "rejected") for sample in pairs
        ]
        last = torch.tensor([self._read_at(token_ids) for [(token_ids, _)] in sequences])
        margin = torch.tensor([float(sample["margin"][0]) for sample in pairs])
        return self.batch(sequences, shape, len(pairs), {"last": last, "margin": margin})

    def _read_at(self, token_ids: Any) -> int:
        """Where transformers' classifier reads: some tokenizers pad with the token that ends an answer."""
        places = reversed(range(len(token_ids)))
        return next((place for place in places if token_ids[place] != self.pad_token_id), 0)

    def extend(self, model: torch.nn.Module) -> Mapping[str, torch.nn.Module]:
        import torch

        config: Any = model.config
        config.num_labels = 1  # transformers then loads the export as a classifier with one number
        head = torch.nn.Linear(config.hidden_size, 1, bias=False)
        torch.nn.init.normal_(head.weight, std=SPREAD)
        return {HEAD: head}

    def loss(self, model: Any, batch: TokenBatch, statistics: Mapping[str, torch.Tensor] = {}) -> Loss:
        import torch
        from panda.tasks.scores import last_hidden

        from panda_preference import losses

        last = batch["last"]
        hidden = last_hidden(model, batch)[torch.arange(len(last), device=last.device), last]
        chosen, rejected = self.part(model, HEAD)(hidden).squeeze(-1).float().chunk(2)
        of_pairs = losses.bradley_terry(chosen, rejected, batch["margin"], self.centering)
        return Loss(of_pairs.sum(), reward_metrics(chosen, rejected))
