"""Rotary embeddings whose frequencies depend on the length of a sample: dynamic NTK and LongRoPE.

transformers (5.23, 2026-11) chooses the frequencies of a whole batch by its longest row, and for dynamic NTK
keeps those of the longest batch seen until a short one: the loss of a sample would depend on its neighbours and
on the number of ranks. Here each sample has the frequencies of its own length, which transformers gives it in a
batch of its own. This can go when transformers does the same.
"""

from __future__ import annotations

from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch

from panda.registry import UserError

_lengths: ContextVar[torch.Tensor | None] = ContextVar("lengths", default=None)
"""During a forward: for each token, [rows, length], the number of tokens of its sample."""


def stretch_by_sample(model: Any, max_seq_length: int) -> None:
    """Make ``model``, of transformers, choose the frequencies of such an embedding for each sample by its length.

    It then has to be given ``position_ids``, from 0 on in each sample and in padding, and says so with
    ``needs_positions``. Without them a row is one sample. Nothing is done where samples of up to ``max_seq_length``
    tokens are not stretched. Raises UserError for an embedding of this kind with a forward of its own.
    """
    found = [part for part in model.modules() if _rule_of(part) is not None and _original(part) < max_seq_length]
    for part in found:
        if not isinstance(part.rope_type, str) or not hasattr(part, "original_inv_freq"):
            raise UserError(
                f"RoPE of {type(model).__name__} is stretched by the length of a batch ({part.rope_type}), in a form"
                " for which panda cannot keep the samples of a batch apart. Use a checkpoint with another `rope_type`."
            )
        part.forward = MethodType(_forward, part)
    if not found:
        return
    base = model.base_model
    plain_forward = base.forward

    def forward(self: Any, input_ids: torch.Tensor | None = None, *arguments: Any, **keywords: Any) -> Any:
        token = _lengths.set(_sample_lengths(input_ids, keywords.get("position_ids")))
        try:
            return plain_forward(input_ids, *arguments, **keywords)
        finally:
            _lengths.reset(token)

    base.forward = MethodType(forward, base)
    model.needs_positions = True


def needs_positions(model: torch.nn.Module) -> bool:
    """Whether ``model`` has to be given positions even where a row is one sample."""
    return any(getattr(part, "needs_positions", False) for part in model.modules())


def _rule_of(part: Any) -> str | None:
    """The rule by which ``part``, any module, stretches positions, if that depends on the length; else None."""
    rules = getattr(part, "rope_type", None)
    for rule in rules.values() if isinstance(rules, dict) else (rules,):
        if isinstance(rule, str) and (rule == "longrope" or "dynamic" in rule):
            return rule
    return None


def _original(part: Any) -> int:
    """The number of positions that the embedding ``part`` had before it was stretched."""
    rope = part.config.rope_parameters or {}
    stated = rope.get("original_max_position_embeddings") if _rule_of(part) == "longrope" else None
    original: int = stated or part.config.max_position_embeddings
    return original


def _sample_lengths(input_ids: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor | None:
    if positions is not None:
        # What is before the first 0 is padding on the left, or goes on with a sample that is in a cache.
        sample = (positions == 0).cumsum(-1)
        longest = positions.new_zeros(len(positions), positions.shape[-1] + 1)
        return longest.scatter_reduce(-1, sample, positions + 1, "amax").gather(-1, sample)
    return None if input_ids is None else torch.full_like(input_ids, input_ids.shape[-1])


@torch.no_grad()
def _forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward of a rotary embedding of transformers, with the frequencies of each sample: cosines and sines."""
    lengths = _lengths.get()
    if lengths is None:
        embedded: tuple[torch.Tensor, torch.Tensor] = type(self).forward(self, x, position_ids)
        return embedded
    frequencies = _frequencies(self, lengths.to(x.device))
    with torch.autocast(x.device.type, enabled=False):
        angles = position_ids.unsqueeze(-1).float() * frequencies
        both = torch.cat((angles, angles), dim=-1)
        cosine, sine = both.cos() * self.attention_scaling, both.sin() * self.attention_scaling
    return cosine.to(x.dtype), sine.to(x.dtype)


def _frequencies(embedding: Any, lengths: torch.Tensor) -> torch.Tensor:
    """[rows, length, half a head] for ``lengths`` [rows, length], in float32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config, rule, device = embedding.config, embedding.rope_type, lengths.device
    if rule == "longrope":
        original = config.rope_parameters["original_max_position_embeddings"]
        long, _ = ROPE_INIT_FUNCTIONS[rule](config, device, seq_len=original + 1)
        short, _ = ROPE_INIT_FUNCTIONS[rule](config, device, seq_len=original)
        return torch.where((lengths > original).unsqueeze(-1), long, short)
    # Dynamic NTK raises the base to a power of the length; up to the original length frequencies are the plain ones.
    plain = embedding.original_inv_freq.to(device).float()
    original, factor, size = config.max_position_embeddings, config.rope_parameters["factor"], 2 * len(plain)
    stretch = factor * lengths.clamp(min=original).float() / original - (factor - 1)
    exponent = torch.arange(0, size, 2, device=device).float() / (size - 2)
    frequencies: torch.Tensor = plain * stretch.unsqueeze(-1) ** -exponent
    return frequencies
