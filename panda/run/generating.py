"""Generation with the model that is trained: what a run gives a task to make its own samples with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from panda.answers.drawing import drawn
from panda.answers.positions import held_positions
from panda.engine.engine import Engine
from panda.engine.processes import Processes
from panda.registry import UserError
from panda.tasks.task import Generate
from panda.tasks.task import Generated

MEMORY = 0.4
"""The share of a GPU's free memory that keys and values may have. Where they have more, rows are drawn in turns."""
ROWS_ON_CPU = 512
"""Rows that are drawn at once without a GPU."""


def generate_of(engine: Engine, processes: Processes, *, seed: int, end_tokens: Sequence[int]) -> Generate:
    """Continues prompts with the model of ``engine`` as it is, on all ranks of ``processes`` together."""
    return functools.partial(_generate, engine, processes, seed, tuple(end_tokens))


def _generate(
    engine: Engine,
    processes: Processes,
    seed: int,
    ends: tuple[int, ...],
    prompts: Sequence[Sequence[int]],
    *,
    keys: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    end_tokens: Sequence[int] | None = None,
) -> Generated:
    module, device = engine.evaluating(), processes.device
    longest = max(map(len, prompts), default=0) + max_new_tokens
    positions = held_positions(module)
    if positions is not None and longest > positions:
        raise UserError(
            f"generation: a prompt and {max_new_tokens:,} new tokens are {longest:,}, and the model has"
            f" {positions:,} positions. Lower `max_seq_length`, or the number of new tokens."
        )
    # Where weights are partitioned, ranks gather them together for each token, until none of them has a row that runs.
    is_partitioned = processes.world_size > 1 and any(hasattr(p, "ds_id") for p in module.parameters())

    def on_any_rank(here: bool) -> bool:
        return any(processes.from_all(here))

    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))  # so that little is padded
    size = rows_at_once(module, longest, device)
    turns = -(-len(prompts) // size)
    if is_partitioned:
        turns = max(processes.from_all(turns))
    parts = [order[start : start + size] for start in range(0, turns * size, size)]
    made: dict[int, tuple[list[int], list[float], bool]] = {}
    with torch.compiler.set_stance("force_eager"):  # compiled layers would be compiled again for each length
        for part in parts:
            found = drawn(
                module,
                [prompts[number] for number in part],
                keys=[keys[number] for number in part],
                seed=seed,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                end_tokens=ends if end_tokens is None else end_tokens,
                device=device,
                together=on_any_rank if is_partitioned else None,
            )
            made |= dict(zip(part, zip(*found, strict=True), strict=True))
    rows = [made[number] for number in range(len(prompts))]
    return Generated([ids for ids, _, _ in rows], [each for _, each, _ in rows], [ended for _, _, ended in rows])


def rows_at_once(module: Any, length: int, device: torch.device) -> int:
    """The rows of ``length`` tokens of which the keys and values have room on ``device``."""
    if device.type != "cuda":
        return ROWS_ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, int(MEMORY * free / (length * bytes_of_token(module))))


def bytes_of_token(module: Any) -> int:
    """What keys and values of a token take, and its part of the scores of the last one."""
    config: Any = getattr(module, "config", None)
    width = getattr(config, "hidden_size", 1024)
    heads = getattr(config, "num_attention_heads", 1) or 1
    shared = getattr(config, "num_key_value_heads", heads) or heads
    layers = getattr(config, "num_hidden_layers", 32)
    head = getattr(config, "head_dim", None) or width // heads
    size: int = next(module.parameters()).element_size()
    return int(2 * layers * shared * head * size)
