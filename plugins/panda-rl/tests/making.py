"""What the tests of this package make: contexts and batches without a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from panda.data.batches import Batch
from panda.registry.contexts import TaskContext
from tokenizers import Tokenizer
from tokenizers import models
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from panda_rl.reward import Reward


def words_tokenizer(size: int = 41) -> Any:
    """A tokenizer of the words t0, t1, ...; t0 pads and t1 ends."""
    made = Tokenizer(models.WordLevel({f"t{number}": number for number in range(size)}, unk_token="t2"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="t0", eos_token="t1", unk_token="t2")


def context_with(rewards: Mapping[str, Reward], *, max_seq_length: int, tokenizer: Any = None) -> TaskContext:
    """A context in which the options have named ``rewards``."""
    named = [
        SimpleNamespace(name=name, component=SimpleNamespace(kind="reward"), build=lambda _, expected, made=made: made)
        for name, made in rewards.items()
    ]
    reader = SimpleNamespace(suffixes=(".jsonl",))
    return TaskContext(tokenizer or words_tokenizer(), reader, max_seq_length, named=named)  # type: ignore[arg-type]


def prompt_batch(prompts: list[list[int]], fields: list[dict[str, Any]] | None = None, first: int = 0) -> Batch:
    """A batch as ``Grpo.collate`` makes it."""
    rows = [json.dumps(each).encode() for each in fields or [{}] * len(prompts)]
    arrays = {
        "index": torch.arange(first, first + len(prompts)),
        "prompt": torch.tensor([token for prompt in prompts for token in prompt]),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts]),
        "row": torch.tensor([byte for row in rows for byte in row]),
        "row_lengths": torch.tensor([len(row) for row in rows]),
    }
    return Batch(arrays, units=len(prompts), tokens=sum(map(len, prompts)))
