"""Continuing prompts with any causal model, which only needs a forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


@torch.no_grad()
def greedy(
    model: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    pad_token_id: int,
    eos_token_id: int,
    device: torch.device,
    positions: int | None = None,
) -> list[list[int]]:
    """The greedy continuation of each of ``prompts`` (token ids), without the end of sequence that stops it.

    A row ends at ``positions`` tokens, if the model has no more; prompts must not be longer.

    Every token runs forward on the whole rows: slow, acceptable for a few short answers, and possible with any
    model. Where weights are partitioned, every rank has to call it.
    """
    longest = max(map(len, prompts)) + max_new_tokens
    rows = torch.full((len(prompts), longest), pad_token_id, dtype=torch.int64, device=device)
    lengths = [len(prompt) for prompt in prompts]
    for row, prompt in enumerate(prompts):
        rows[row, : len(prompt)] = torch.tensor(prompt, device=device)
    running = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        output = model(rows[:, : max(lengths)])
        logits = getattr(output, "logits", output)
        running = {row for row in running if lengths[row] != positions}
        for row in sorted(running):
            token = int(logits[row, lengths[row] - 1].argmax())
            if token == eos_token_id:
                running.discard(row)
            else:
                rows[row, lengths[row]] = token
                lengths[row] += 1
        if not running:
            break
    return [rows[row, len(prompt) : lengths[row]].tolist() for row, prompt in enumerate(prompts)]


@torch.no_grad()
def continuation(
    model: Any,
    prompt: list[int],
    *,
    max_new_tokens: int,
    eos_token_id: int,
    temperature: float,
    top_p: float,
    device: torch.device,
) -> Iterator[int]:
    """The tokens with which ``model`` continues ``prompt``, one by one, without the end of sequence that stops it.

    Like ``greedy`` it only needs the model's forward. ``temperature`` 0 takes the likeliest token.
    """
    ids = list(prompt)
    for _ in range(max_new_tokens):
        output = model(torch.tensor([ids], device=device))
        logits = getattr(output, "logits", output)[0, -1].float()
        token = int(logits.argmax()) if temperature == 0 else _drawn(logits / temperature, top_p)
        if token == eos_token_id:
            return
        yield token
        ids.append(token)


def _drawn(logits: torch.Tensor, top_p: float) -> int:
    """A token sampled from the likeliest ones that together have probability ``top_p``, at least one."""
    probabilities, tokens = logits.softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    return int(tokens[torch.multinomial(probabilities * (before < top_p), 1)])
