"""Generation in the loop: a task continues prompts with the model that is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from panda.answers.generation import Processors
from panda.answers.sampling import Manner
from panda.answers.sampling import Sampled
from panda.answers.sampling import random_numbers
from panda.answers.sampling import sampled
from panda.configuration.options import RunOptions
from panda.engine.engine import Engine
from panda.models.forward.layers import without_compiling
from panda.registry import UserError
from panda.tasks.task import Generated

SHARE_OF_MEMORY = 0.4
"""Of a GPU's free memory, what the rows that are continued at once may have. Attention copies a layer's keys and values
as they grow, and the rest of the model works beside them."""
SHARE_IF_DETERMINISTIC = 0.1
"""Of all of a GPU's memory, the same for a run with `deterministic`."""
ROWS_WITHOUT_GPU = 256
"""Rows that are continued at once without a GPU."""
BYTES_OF_SCORE = 48
"""Of each entry of the vocabulary, in a row: scores in 32 bits, probabilities and their sums in 64, and sorted ones."""


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
        processors: Processors | None = None,
        criteria: Sequence[Any] = (),
    ) -> Generated:
        """See ``Generate``."""
        if len(keys) != len(prompts) or not all(prompts):
            raise UserError("task: `generate` needs a key for each prompt, and prompts that have tokens.")
        together = self.options.zero == 3 and self.engine.processes.world_size > 1
        if not prompts and not together:
            return Generated([], [], [])
        processes, module = self.engine.processes, self.engine.evaluating()
        manner = Manner(max_new_tokens, temperature, top_p, top_k)
        made: dict[int, Sampled] = {}
        with without_compiling(self.options.compiled), torch.random.fork_rng(devices=[]):
            for turn in self._turns(module, prompts, max_new_tokens, together=together):
                found: list[Sampled] = sampled(
                    module,
                    [prompts[number] for number in turn] or [[self.pad_token_id]],  # it runs the model with the others
                    random_numbers(self.options.seed, [keys[number] for number in turn] or [()], max_new_tokens),
                    manner,
                    end_tokens=self.end_tokens if end_tokens is None else end_tokens,
                    pad_token_id=self.pad_token_id,
                    device=processes.device,
                    all_done=processes.all_ if together else None,
                    processors=processors,
                    criteria=criteria,
                )
                made |= zip(turn, found, strict=False)
        rows = [made[number] for number in range(len(prompts))]
        return Generated(
            [each.token_ids for each in rows], [each.log_probs for each in rows], [each.ended for each in rows]
        )

    def _turns(
        self, module: torch.nn.Module, prompts: Sequence[Sequence[int]], new: int, *, together: bool
    ) -> list[list[int]]:
        """The numbers of the ``prompts`` that are continued at once, those of like lengths: with little padding.

        With ``together`` equally many turns on all ranks, the last of them perhaps without prompts.
        """
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        longest = len(prompts[order[-1]]) + new if order else 1
        size = rows_at_once(module, longest, self.engine.processes.device)
        count = -(-len(order) // size)
        if together:
            count = max(self.engine.processes.from_all(count))
        return [order[start : start + size] for start in range(0, count * size, size)]


def rows_at_once(module: torch.nn.Module, length: int, device: torch.device) -> int:
    """How many rows of ``length`` tokens ``device`` has room for, with keys and values of each.

    Where runs are to repeat to the bit it is a part of all memory, since what is free differs from start to start.
    """
    if device.type != "cuda":
        return ROWS_WITHOUT_GPU
    if torch.are_deterministic_algorithms_enabled():
        room = SHARE_IF_DETERMINISTIC * torch.cuda.get_device_properties(device).total_memory
        return max(1, int(room / bytes_of_row(module, length)))
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, int(SHARE_OF_MEMORY * free / bytes_of_row(module, length)))


def bytes_of_row(module: torch.nn.Module, length: int) -> int:
    """What a row of ``length`` tokens takes: keys and values, and the scores of one token as the next is chosen."""
    config: Any = getattr(module, "config", None)
    width = getattr(config, "hidden_size", None) or 1024
    heads = getattr(config, "num_attention_heads", None) or 1
    shared = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or width // heads
    layers = getattr(config, "num_hidden_layers", None) or 32
    kept = 2 * layers * shared * head * length * next(module.parameters()).element_size()
    return int(kept + BYTES_OF_SCORE * (getattr(config, "vocab_size", None) or 1))
