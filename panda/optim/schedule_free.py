"""The ``schedule_free_adamw`` optimizer: AdamW that averages its weights, in place of a rate that falls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from panda.optim.adam_options import AdamOptions
from panda.registry import UserError
from panda.registry import register_optimizer
from panda.registry.contexts import OptimizerContext

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScheduleFreeOptions(AdamOptions):
    """Options of schedule-free AdamW. The first of adam_betas is how near to the average gradients are taken."""

    def __post_init__(self) -> None:
        if self.adam_betas[0] == 0:
            raise UserError("adam_betas: the first has to be above 0 for schedule_free_adamw; 0.9 is usual.")


@register_optimizer("schedule_free_adamw", options=ScheduleFreeOptions)
def build_schedule_free_adamw(options: ScheduleFreeOptions, context: OptimizerContext) -> torch.optim.Optimizer:
    """AdamW without a schedule: it evaluates, exports and saves an average of its weights (arXiv 2405.15682).

    With `lr_scheduler: constant` and a warm-up, whatever the number of steps, and with a rate of one to ten times that
    of AdamW. Training goes on from other weights, which checkpoints hold, too.
    """
    from panda.optim.averaging import ScheduleFreeAdamW

    return ScheduleFreeAdamW(context.param_groups, betas=options.adam_betas, eps=options.adam_epsilon)
