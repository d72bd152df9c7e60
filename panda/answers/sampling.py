"""Answers sampled in batches, each from random numbers of its own: the same however prompts are put together."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from panda.answers.generation import Processors
from panda.answers.generation import lengths_vary
from panda.answers.positions import held_positions
from panda.registry import UserError

ROUTERS = "output_router_logits"
"""Of the configuration of a mixture of experts: whether it computes the loss of its routers."""


@dataclass(frozen=True)
class Manner:
    """How each token is chosen."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Samples only from the likeliest tokens, as many as have this probability together."""
    top_k: int = 0
    """Samples only from so many of the likeliest tokens; 0 for no limit."""


@dataclass(frozen=True)
class Sampled:
    """What follows a prompt."""

    token_ids: list[int]
    """With the token that ends it, if that came."""
    log_probs: list[float]
    """Of each, under the temperature and before ``top_p`` and ``top_k``."""
    ended: bool


def random_numbers(seed: int, keys: Sequence[tuple[int, ...]], count: int) -> np.ndarray:
    """float64 [keys, count], in [0, 1): those of a key depend on it and on ``seed`` only."""
    rows = [np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *key]))).random(count) for key in keys]
    return np.stack(rows) if rows else np.empty((0, count))


@torch.no_grad()
def sampled(
    module: Any,
    prompts: Sequence[Sequence[int]],
    draws: np.ndarray,
    manner: Manner,
    *,
    end_tokens: Sequence[int],
    pad_token_id: int,
    device: torch.device,
    all_done: Callable[[bool], bool] | None = None,
    processors: Processors | None = None,
    criteria: Sequence[Any] = (),
) -> list[Sampled]:
    """What ``module``, any causal model in evaluation mode, continues ``prompts`` with.

    ``draws`` [prompts, max_new_tokens]: random numbers in [0, 1), one for each token. With ``all_done`` ranks run the
    model together until it is true for all of them: given whether this one is done, it says whether all are. Models of
    transformers keep keys and values. ``processors`` and ``criteria`` (transformers' stopping criteria) are those of
    inference, as of ``panda.weights.generation_config.Decoding``; by default there are none. Raises UserError where the
    model has too few positions.
    """
    longest = max(map(len, prompts))
    most = held_positions(module)
    if most is not None and longest + manner.max_new_tokens > most:
        raise UserError(
            f"task: the model has {most:,} positions, and a prompt of {longest:,} tokens is to be continued by"
            f" {manner.max_new_tokens:,}. Lower one of the two."
        )
    changes = [processors([*each], len(each) + manner.max_new_tokens, device) for each in prompts] if processors else []
    chooser = _Chooser(torch.from_numpy(draws).to(device), manner, [len(each) for each in prompts], changes)
    base = module.get_base_model() if hasattr(module, "get_base_model") else module
    made = _with_cache if _has_generate(base) else _step_by_step
    with lengths_vary():
        rows = made(base, prompts, chooser, end_tokens, pad_token_id, all_done)
    log_probs = torch.stack(chooser.log_probs, 1).tolist() if chooser.log_probs else [[] for _ in prompts]
    found = []
    for prompt, row, scores in zip(prompts, rows, log_probs, strict=True):
        length = next((n for n, token in enumerate(row, 1) if token in end_tokens), manner.max_new_tokens)
        kept = row[: min(length, manner.max_new_tokens)]
        stopped = _stopped(prompt, kept, criteria)
        kept = kept[:stopped]
        found.append(Sampled(kept, scores[: len(kept)], stopped is not None or (bool(kept) and kept[-1] in end_tokens)))
    return found


def _stopped(prompt: Sequence[int], answer: Sequence[int], criteria: Sequence[Any]) -> int | None:
    """The tokens of ``answer`` after which one of ``criteria`` stops it; None where none does."""
    for length in range(1, len(answer) + 1) if criteria else ():
        row = torch.tensor([[*prompt, *answer[:length]]])
        # No criterion that panda uses looks at the scores, for which transformers' signature has a place.
        if any(bool(criterion(row, None).all()) for criterion in criteria):
            return length
    return None


def _has_generate(module: Any) -> bool:
    from transformers import GenerationMixin

    return isinstance(module, GenerationMixin)


class _Chooser:
    """Chooses the next token of each row; called like a logits processor of transformers."""

    def __init__(self, draws: torch.Tensor, manner: Manner, lengths: Sequence[int], changes: Sequence[Any]) -> None:
        """``lengths``: of the prompts, in tokens; ``changes``: of each row the processors of its scores, or none."""
        self.draws, self.manner, self.lengths, self.changes = draws, manner, lengths, changes
        self.log_probs: list[torch.Tensor] = []

    def choose(self, logits: torch.Tensor, row: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        """int64 [rows]: the next tokens, by ``logits`` [rows, entries].

        ``row`` gives the tokens of a row until now, by its number and how many they are.
        """
        manner, step = self.manner, len(self.log_probs)
        logits = logits.float()
        for number, processors in enumerate(self.changes):
            for processor in processors:
                tokens = row(number, self.lengths[number] + step)[None]
                logits[number] = processor(tokens, logits[number][None])[0]
        if manner.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            logits = logits / manner.temperature
            # In the order of the vocabulary: where tokens are nearly as likely, an order by likelihood would depend on
            # the rounding of a batch.
            chances = _running_sums((logits.softmax(-1) * self._allowed(logits)).double())
            at_most = self.draws[:, step : step + 1] * chances[:, -1:]
            tokens = torch.searchsorted(chances, at_most, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
        self.log_probs.append(logits.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1))
        return tokens

    def _allowed(self, logits: torch.Tensor) -> torch.Tensor:
        manner = self.manner
        allowed = torch.ones_like(logits, dtype=torch.bool)
        if manner.top_k:
            allowed &= logits >= logits.topk(min(manner.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        if manner.top_p < 1:
            chances, order = logits.masked_fill(~allowed, -torch.inf).softmax(-1).sort(-1, descending=True)
            before = _running_sums(chances) - chances
            allowed &= torch.zeros_like(allowed).scatter(-1, order, before < manner.top_p)
        return allowed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Prompts of fewer tokens have padding before them.
        tokens = self.choose(scores, lambda row, length: input_ids[row, input_ids.shape[1] - length :])
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.unsqueeze(1), 0.0)


def _running_sums(numbers: torch.Tensor) -> torch.Tensor:
    """The sums along the last dimension, up to each element."""
    if numbers.is_cuda and torch.are_deterministic_algorithms_enabled():
        # torch 2.13 sums floats on a GPU in any order, and raises where that is asked to be the same each time.
        return numbers.cpu().cumsum(-1).to(numbers.device)
    return numbers.cumsum(-1)


def _with_cache(
    module: Any,
    prompts: Sequence[Sequence[int]],
    chooser: _Chooser,
    end_tokens: Sequence[int],
    pad_token_id: int,
    all_done: Callable[[bool], bool] | None,
) -> list[list[int]]:
    """By transformers, which keeps keys and values."""
    import transformers

    config: Any = transformers.GenerationConfig
    longest, device = max(map(len, prompts)), chooser.draws.device
    rows = torch.full((len(prompts), longest), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(rows)
    for row, prompt in enumerate(prompts):
        rows[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    settings = config(
        do_sample=False,
        max_new_tokens=chooser.manner.max_new_tokens,
        eos_token_id=list(end_tokens) or None,
        pad_token_id=pad_token_id,
        use_cache=True,
    )
    # What `settings` lack is taken from here: nothing of the model's own is followed.
    kept, module.generation_config = module.generation_config, config()
    # The loss of routers, which mixtures would compute besides, fails on rows that are padded on the left.
    routers = getattr(module.config, ROUTERS, None)
    if routers:
        setattr(module.config, ROUTERS, False)
    try:
        output = module.generate(
            rows.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            logits_processor=[chooser],
            synced_gpus=all_done is not None,
        )
    finally:
        module.generation_config = kept
        if routers:
            setattr(module.config, ROUTERS, routers)
    made: list[list[int]] = output[:, longest:].tolist()
    return made


def _step_by_step(
    module: Any,
    prompts: Sequence[Sequence[int]],
    chooser: _Chooser,
    end_tokens: Sequence[int],
    pad_token_id: int,
    all_done: Callable[[bool], bool] | None,
) -> list[list[int]]:
    """Of any model, which runs on the whole rows for each token: slow."""
    device, most = chooser.draws.device, chooser.manner.max_new_tokens
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    rows = torch.full((len(prompts), int(starts.max()) + most), pad_token_id, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        rows[row, : len(prompt)] = torch.tensor(prompt, device=device)
    ends = torch.tensor(list(end_tokens), dtype=torch.int64, device=device)
    each, done = torch.arange(len(prompts), device=device), torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(most):
        output = module(rows[:, : int(starts.max()) + step])
        logits = getattr(output, "logits", output)
        tokens = chooser.choose(logits[each, starts + step - 1], lambda row, length: rows[row, :length])
        rows[each, starts + step] = tokens
        done |= torch.isin(tokens, ends)
        is_done = bool(done.all())
        if all_done(is_done) if all_done else is_done:
            break
    return [row[start : start + most].tolist() for row, start in zip(rows, starts.tolist(), strict=True)]
