"""Drawing continuations of many prompts at once: what a task that makes its own samples trains on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

CHECKED_EVERY = 8
"""Tokens after which the host asks whether all rows have ended, and waits for the device."""

Drawn = tuple[list[list[int]], list[list[float]], list[bool]]
"""Of each prompt its tokens, with the one that ends them if it came; their log-probabilities; and whether it came."""


@torch.no_grad()
def drawn(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    keys: Sequence[tuple[int, ...]],
    seed: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    end_tokens: Sequence[int],
    device: torch.device,
    together: Callable[[bool], bool] | None = None,
) -> Drawn:
    """Continuations of ``prompts``, a row each, by ``model`` in evaluation mode: at least one token of each.

    Random numbers follow from ``seed`` and the key of a prompt only, so the rows beside it matter only to rounding.
    ``temperature`` 0 takes the likeliest token. A model of transformers keeps keys and values; any other runs on the
    whole rows for each token. ``together``: where ranks have to run the model equally often, whether one of them is
    true on any rank; ``prompts`` may then be empty on some.
    """
    rows = [list(prompt) for prompt in prompts] or [[end_tokens[0]]]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width + max_new_tokens), rows[0][0], dtype=torch.int64)
    real = torch.zeros(ids.shape, dtype=torch.int64)
    for row, prompt in enumerate(rows):  # on the right, so that all continue at the same place
        ids[row, width - len(prompt) : width] = torch.tensor(prompt)
        real[row, width - len(prompt) :] = 1
    ids, real = ids.to(device), real.to(device)
    chances = torch.from_numpy(_chances(keys, seed, max_new_tokens, len(rows))).to(device)
    log_probs = torch.zeros(len(rows), max_new_tokens, device=device)
    ends = torch.tensor(sorted(end_tokens), device=device)
    running = torch.full((len(rows),), bool(prompts), device=device)
    forward = _Forward(model, real)
    for number in range(max_new_tokens):
        logits = forward(ids, width + number)
        token, log_probs[:, number] = _chosen(logits, chances[:, number], temperature, top_p, top_k)
        ids[:, width + number] = token
        running = running & ~torch.isin(token, ends)
        if (number + 1) % CHECKED_EVERY == 0:
            goes_on = bool(running.any())
            if not (together(goes_on) if together else goes_on):
                break
    done = number + 1
    return _up_to_the_end(ids[:, width : width + done], log_probs[:, :done], ends, len(prompts))


def _up_to_the_end(ids: torch.Tensor, log_probs: torch.Tensor, ends: torch.Tensor, count: int) -> Drawn:
    """The first ``count`` rows of ``ids``, each up to the first of ``ends``."""
    at_end = torch.isin(ids, ends)
    ended = at_end.any(dim=1)
    lengths = torch.where(ended, at_end.int().argmax(dim=1) + 1, ids.shape[1]).tolist()
    tokens, probabilities = ids.tolist(), log_probs.tolist()
    return (
        [tokens[row][: lengths[row]] for row in range(count)],
        [probabilities[row][: lengths[row]] for row in range(count)],
        ended.tolist()[:count],
    )


def _chances(keys: Sequence[tuple[int, ...]], seed: int, count: int, rows: int) -> np.ndarray:
    """float64 [rows, count], from 0 to below 1: of each key its own."""
    found = np.zeros((rows, count))
    for row, key in enumerate(keys):
        found[row] = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *key]))).random(count)
    return found


def _chosen(
    logits: torch.Tensor, chances: torch.Tensor, temperature: float, top_p: float, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token of each row of ``logits`` [rows, entries], and its log-probability: [rows], by ``chances`` [rows].

    The token is where the sum of the probabilities, in their order, passes the chance.
    """
    logits = logits.float()
    if temperature == 0:
        token = logits.argmax(dim=-1)
    else:
        logits = logits / temperature
        probabilities, order = logits.softmax(dim=-1), None
        if top_p < 1 or top_k > 0:
            probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
            if top_p < 1:
                probabilities = probabilities * (probabilities.cumsum(dim=-1) - probabilities < top_p)
            if top_k > 0:
                probabilities[:, top_k:] = 0
        sums = probabilities.double().cumsum(dim=-1)
        place = torch.searchsorted(sums, (chances * sums[:, -1]).unsqueeze(1), right=True)
        last = (probabilities > 0).cumsum(dim=-1).argmax(dim=-1, keepdim=True)  # where rounding has passed the sum
        token = torch.minimum(place, last)
        token = (token if order is None else order.gather(1, token)).squeeze(1)
    picked = logits.gather(1, token.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=-1)
    return token, picked


class _Forward:
    """The logits of the next token, one after another; keeps keys and values where the model can."""

    def __init__(self, model: Any, real: torch.Tensor) -> None:
        """``real`` [rows, length]: 0 before the beginning of a row."""
        from transformers import PreTrainedModel

        self.model, self.real = model, real
        self.positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # under adapters
        self.is_cached = isinstance(base, PreTrainedModel)
        self.only_last: dict[str, Any] = {}
        if self.is_cached and "logits_to_keep" in inspect.signature(base.forward).parameters:
            self.only_last = {"logits_to_keep": 1}
        self.cache: Any = None
        self.seen = 0

    def __call__(self, ids: torch.Tensor, length: int) -> torch.Tensor:
        """[rows, entries] of the token after the first ``length`` of ``ids``."""
        if not self.is_cached:
            return self._on_whole_rows(ids, length)
        output = self.model(
            ids[:, self.seen : length],
            attention_mask=self.real[:, :length],
            position_ids=self.positions[:, self.seen : length],
            past_key_values=self.cache,
            use_cache=True,
            **self.only_last,
        )
        self.cache, self.seen = output.past_key_values, length
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _on_whole_rows(self, ids: torch.Tensor, length: int) -> torch.Tensor:
        """Without padding before a row, since not every model knows a mask: rows begin where they begin."""
        starts = (length - self.real[:, :length].sum(dim=1)).unsqueeze(1)
        places = torch.arange(length, device=ids.device) + starts
        shifted = ids[:, :length].gather(1, places.clamp(max=length - 1))
        output = self.model(shifted)
        logits = getattr(output, "logits", output)
        last = (length - starts - 1).unsqueeze(2).expand(-1, 1, logits.shape[2])
        found: torch.Tensor = logits.gather(1, last).squeeze(1)
        return found
