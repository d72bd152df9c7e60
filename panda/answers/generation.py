"""Continuing prompts with any causal model, which only needs a forward."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch

Processors = Callable[[list[int], int, torch.device], Any]
"""From a prompt, and the most tokens of prompt and answer: what changes the scores of the next token, as transformers'
logits processors do."""


@contextmanager
def lengths_vary() -> Iterator[None]:
    """For calls of a model whose row length differs each time: attention without cuDNN's kernels.

    cuDNN makes a plan for each length that it has not met, in 40 ms on an H100, and in 0.6 s where that needs new code
    (2026-11, torch 2.11). In training, plans are used again and again; here each token would wait for one.
    """
    before: bool = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@torch.no_grad()
def greedy(
    model: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    max_length: int | None = None,
    pad_token_id: int,
    end_tokens: Collection[int],
    processors: Processors | None = None,
    criteria: Sequence[Any] = (),
    device: torch.device,
) -> list[list[int]]:
    """The greedy continuation of each of ``prompts`` (token ids), without the token of ``end_tokens`` that stops it.

    It also stops where a prompt and its answer have ``max_length`` tokens, or one of ``criteria`` (transformers'
    stopping criteria) says so. Every token runs forward on the whole rows: slow, acceptable for a few short answers,
    and possible with any model. Where weights are partitioned, every rank has to call it.
    """
    lengths = [len(prompt) for prompt in prompts]
    ends = [length + max_new_tokens for length in lengths]
    if max_length is not None:
        ends = [max(length, min(end, max_length)) for length, end in zip(lengths, ends, strict=True)]
    rows = torch.full((len(prompts), max(ends)), pad_token_id, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        rows[row, : len(prompt)] = torch.tensor(prompt, device=device)
    changes = [processors(prompt, end, device) if processors else [] for prompt, end in zip(prompts, ends, strict=True)]
    running = {row for row, length in enumerate(lengths) if length < ends[row]}
    while running:
        with lengths_vary():
            output = model(rows[:, : max(lengths)])
        logits = getattr(output, "logits", output)
        for row in sorted(running):
            length = lengths[row]
            token = int(_changed(changes[row], rows[row, :length], logits[row, length - 1]).argmax())
            if token in end_tokens:
                running.discard(row)
                continue
            rows[row, length] = token
            lengths[row] = length + 1
            if lengths[row] == ends[row] or _stops(criteria, rows[row, : length + 1]):
                running.discard(row)
    return [rows[row, len(prompt) : lengths[row]].tolist() for row, prompt in enumerate(prompts)]


@torch.no_grad()
def continuation(
    model: Any,
    prompt: list[int],
    *,
    max_new_tokens: int,
    end_tokens: Collection[int],
    temperature: float,
    top_p: float,
    processors: Processors | None = None,
    criteria: Sequence[Any] = (),
    device: torch.device,
) -> Iterator[int]:
    """The tokens with which ``model`` continues ``prompt``, one by one, without that of ``end_tokens`` that stops it.

    Like ``greedy`` it only needs the model's forward. ``temperature`` 0 takes the likeliest token.
    """
    ids = list(prompt)
    changes = processors(prompt, len(prompt) + max_new_tokens, device) if processors else []
    for _ in range(max_new_tokens):
        row = torch.tensor(ids, device=device)
        with lengths_vary():
            output = model(row[None])
        logits = _changed(changes, row, getattr(output, "logits", output)[0, -1])
        token = int(logits.argmax()) if temperature == 0 else _drawn(logits / temperature, top_p)
        if token in end_tokens:
            return
        yield token
        ids.append(token)
        if _stops(criteria, torch.tensor(ids, device=device)):
            return


def _changed(processors: Any, row: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """``logits`` [vocabulary] of the token after ``row`` [length] in float32, with what ``processors`` do to them."""
    changed: torch.Tensor = logits.float()
    for processor in processors:
        changed = processor(row[None], changed[None])[0]
    return changed


def _stops(criteria: Sequence[Any], row: torch.Tensor) -> bool:
    # No criterion that panda uses looks at the scores, for which transformers' signature has a place.
    return any(bool(criterion(row[None], None).all()) for criterion in criteria)


def _drawn(logits: torch.Tensor, top_p: float) -> int:
    """A token sampled from the likeliest ones that together have probability ``top_p``, at least one."""
    probabilities, tokens = logits.softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    return int(tokens[torch.multinomial(probabilities * (before < top_p), 1)])
