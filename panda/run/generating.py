"""Generation in the loop: a task continues prompts with the model that is trained."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any

import torch

from panda.answers.sampling import Manner
from panda.answers.sampling import Sampled
from panda.answers.sampling import random_numbers
from panda.answers.sampling import sampled
from panda.configuration.options import RunOptions
from panda.engine.engine import Engine
from panda.registry import UserError
from panda.tasks.task import Generated


class Generation:
    """Continues prompts with the model of an engine: a ``panda.tasks.task.Generate``."""

    def __init__(self, engine: Engine, options: RunOptions, pad_token_id: int, end_tokens: Sequence[int]) -> None:
        self.engine, self.options = engine, options
        self.pad_token_id, self.end_tokens = pad_token_id, list(end_tokens)

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        keys: Sequence[tuple[int, ...]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        end_tokens: Sequence[int] | None = None,
    ) -> Generated:
        """See ``Generate``."""
        if len(keys) != len(prompts) or not all(prompts):
            raise UserError("task: `generate` needs a key for each prompt, and prompts that have tokens.")
        together = self.options.zero == 3 and self.engine.processes.world_size > 1
        if not prompts and not together:
            return Generated([], [], [])
        processes = self.engine.processes
        manner = Manner(max_new_tokens, temperature, top_p, top_k)
        with _without_compiling(self.options), torch.random.fork_rng(devices=[]):
            found: list[Sampled] = sampled(
                self.engine.evaluating(),
                prompts or [[self.pad_token_id]],  # a rank without prompts runs the model with the others
                random_numbers(self.options.seed, keys or [()], max_new_tokens),
                manner,
                end_tokens=self.end_tokens if end_tokens is None else end_tokens,
                pad_token_id=self.pad_token_id,
                device=processes.device,
                all_done=processes.all_ if together else None,
            )
        found = found if prompts else []
        return Generated(
            [each.token_ids for each in found], [each.log_probs for each in found], [each.ended for each in found]
        )


def _without_compiling(options: RunOptions) -> AbstractContextManager[Any]:
    """Inside it, compiled layers run as they are: each token would be a row of another length."""
    return torch.compiler.set_stance("force_eager") if options.compile else nullcontext()
